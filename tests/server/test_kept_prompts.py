"""Prompts that are kept do not cross from one API key to another, unless the server is told so."""

from __future__ import annotations

from typing import Any

import pytest
from http_servers import chat, connect, serving

from offmoe.server.settings import make_server_settings

KEYS = ("key-of-the-first", "key-of-the-second")
PROMPT = [{"role": "user", "content": "a prompt of some length that two people send, word for word " * 40}]


@pytest.mark.parametrize("shared", [False, True])
def test_kept_prompts_and_keys(shared: bool) -> None:
    settings = make_server_settings(port=0, api_keys=KEYS, share_prompts=shared)
    with serving(settings=settings, kept_prompts="64MiB") as server:
        first, second = (_cached(server, key) for key in KEYS)
        again = _cached(server, KEYS[0])
    assert first == 0
    assert (second > 0) == shared
    assert again > 0


def _cached(server: Any, key: str) -> int:
    with connect(server, headers={"x-api-key": key}) as client:
        usage = chat(client, PROMPT)["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])
