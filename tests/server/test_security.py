"""What a hostile page, a stranger or a broken client sends is refused before anything is read or written."""

from __future__ import annotations

import builtins
import io
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_servers import HI, HeldEngine, chat, connect, refused, serving
from logs import logs_warning

from offmoe.core.errors import DiskReadError, UsageError
from offmoe.server import protocol
from offmoe.server.serve import RunningServer, open_socket
from offmoe.server.settings import make_server_settings, read_keys

KEY, OTHER_KEY = "a-key-of-the-tests", "another-key-of-the-tests"
PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/responses", "/v1/messages")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    settings = make_server_settings(
        port=0, api_keys=(KEY, OTHER_KEY), cors_origins=("https://allowed.example",), allowed_hosts=("my.machine",),
        max_body_bytes=200_000, body_timeout_s=1.0, max_messages=50,
    )  # fmt: skip
    with serving(settings=settings, hold=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with connect(server, headers={"authorization": f"Bearer {KEY}"}) as opened:
        yield opened


@pytest.fixture(scope="module")
def stranger(server: RunningServer) -> Iterator[httpx.Client]:
    with connect(server) as opened:
        yield opened


def test_the_key_is_asked_for(client: httpx.Client, stranger: httpx.Client) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}, {"x-api-key": KEY[:-1]},
                    {"authorization": f"Bearer {KEY}x"}, {"authorization": "Bearer \xff"}):  # fmt: skip
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        for path in PATHS:
            assert stranger.post(path, json={}, headers=encoded).status_code == 401
        assert stranger.get("/v1/models", headers=encoded).status_code == 401
        assert stranger.get("/metrics", headers=encoded).status_code == 401
    assert stranger.get("/health").status_code == 200
    assert stranger.get("/v1/models", headers={"x-api-key": OTHER_KEY}).status_code == 200
    chat(client)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_a_rebound_host_is_refused(client: httpx.Client, host: str) -> None:
    answer = client.get("/v1/models", headers={"host": host})
    assert answer.status_code in {400, 403}
    assert "demo" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:9", "[::1]:8000", "my.machine"])
def test_own_names_are_let_in(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "https://allowed.example.evil", "http://allowed.example"]
)
def test_a_foreign_origin_is_refused(client: httpx.Client, origin: str) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": HI}, headers={"origin": origin})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    preflight = client.options(
        "/v1/chat/completions", headers={"origin": origin, "access-control-request-method": "POST"}
    )
    assert preflight.status_code >= 400 and "access-control-allow-origin" not in preflight.headers


def test_an_allowed_origin_and_the_own_page(client: httpx.Client, server: RunningServer) -> None:
    allowed = {"origin": "https://allowed.example"}
    preflight = client.options("/v1/chat/completions", headers={**allowed, "access-control-request-method": "POST"})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "https://allowed.example"
    assert client.get("/v1/models", headers=allowed).headers["access-control-allow-origin"] == "https://allowed.example"
    assert client.get("/v1/models", headers={"origin": server.url}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_what_a_page_may_send_unasked_is_refused(client: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    for path in PATHS:
        answer = client.post(path, content=json.dumps({"messages": HI}), headers=headers)
        assert answer.status_code == 415


PLACES = ["/etc/passwd", "file:///etc/passwd", "http://169.254.169.254/latest", "..\\..\\windows", "~/.ssh/id_rsa"]


@pytest.mark.parametrize("place", PLACES)
def test_no_path_and_no_address_is_opened(client: httpx.Client, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field of text is given one, and nothing is opened that has it in its name, and no connection begun."""
    opened: list[str] = []
    monkeypatch.setattr(builtins, "open", _watched(builtins.open, opened))
    monkeypatch.setattr(io, "open", _watched(io.open, opened))
    monkeypatch.setattr(os, "open", _watched(os.open, opened))
    monkeypatch.setattr(socket, "getaddrinfo", _watched(socket.getaddrinfo, opened))
    image: Any = [{"type": "image_url", "image_url": {"url": place}}]
    schema = {"type": "object", "properties": {"a": {"$ref": place}}}
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": HI, "model": place}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": image}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": place, "name": place}], "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": HI, "chat_template_kwargs": {"chat_template": place}}),
        ("/v1/chat/completions", {"messages": HI, "chat_template_kwargs": {place: place}}),
        ("/v1/chat/completions", {"messages": HI, "response_format": {"type": place}}),
        ("/v1/chat/completions", {"messages": HI, "tool_choice": place}),
        ("/v1/chat/completions", {"messages": HI, "user": place, "stop": place, "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 1, "response_format": {
            "type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 1, "grammar": place}),
        ("/v1/completions", {"prompt": place, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a", "suffix": place}),
        ("/tokenize", {"prompt": place}),
    ]  # fmt: skip
    for path, fields in requests:
        answer = client.post(path, json=fields)
        assert answer.status_code < 500, (path, fields, answer.text)
    assert not [name for name in opened if any(part in name for part in ("passwd", "169.254", "windows", "id_rsa"))]


def _watched(function: Any, seen: list[str]) -> Any:
    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(str(args[0]))
        return function(*args, **kwargs)

    return watched


HUGE = ["9" * 5000, "1e999", "-1e999", "NaN", "Infinity", "-9223372036854775809", "1" + "0" * 30, "-0.5", "0.5"]


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("name", ["max_tokens", "n", "seed", "top_k", "temperature", "top_p", "presence_penalty"])
def test_numbers_out_of_range(client: httpx.Client, name: str, number: str) -> None:
    body = f'{{"messages": [{{"role": "user", "content": "a"}}], "max_completion_tokens": 1, "{name}": {number}}}'
    if name == "max_tokens":
        body = body.replace('"max_completion_tokens": 1, ', "")
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    if number == "0.5" and name in {"temperature", "top_p", "presence_penalty"}:
        assert answer.status_code == 200
    elif (name, number) in {("presence_penalty", "-0.5"), ("temperature", "1" + "0" * 30)}:
        assert answer.status_code in {200, 400}
    else:
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_deep_json(client: httpx.Client) -> None:
    for body in ("[" * 100_000, '{"messages": ' + "[" * 90 + "]" * 90 + "}", '{"a":' * 20_000):
        answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
    deep: Any = {}
    for _ in range(200):
        deep = {"properties": {"a": deep}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
    assert "deep" in refused(client, "/v1/chat/completions", 400, messages=HI, response_format=form)["message"]


def test_bytes_that_are_no_text(client: httpx.Client) -> None:
    for body in (b"\xff\xfe", b'{"messages": "\xff"}', b"", b"null", b"[]", b'"a"'):
        answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (body, answer.text)
    lone = '{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}'
    assert client.post(
        "/v1/chat/completions", content=lone, headers={"content-type": "application/json"}
    ).status_code == 400  # fmt: skip


def test_bodies_that_are_too_large(client: httpx.Client) -> None:
    large = json.dumps({"prompt": "a" * 300_000}).encode()
    assert client.post("/tokenize", content=large, headers={"content-type": "application/json"}).status_code == 413

    def pieces() -> Iterator[bytes]:  # without a length
        for _ in range(40):
            yield b"a" * 10_000

    assert client.post("/tokenize", content=pieces(), headers={"content-type": "application/json"}).status_code == 413


def test_too_many_messages(client: httpx.Client) -> None:
    assert refused(client, "/v1/chat/completions", 400, messages=HI * 51)["param"] == "messages"


def test_a_body_that_never_ends_is_given_up(server: RunningServer) -> None:
    with _raw(server) as slow:
        slow.sendall(_head(server, length=100))
        slow.sendall(b"{")
        assert b" 408 " in slow.recv(4096)


def test_headers_that_never_end_are_given_up(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADERS_S", 0.5)
    with _raw(server) as slow:
        begin = time.monotonic()
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: local")
        assert slow.recv(4096) == b""
        assert time.monotonic() - begin >= 0.4


def _raw(server: RunningServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def _head(server: RunningServer, *, length: int) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}",
             "Content-Type: application/json", f"Content-Length: {length}", "", ""]  # fmt: skip
    return "\r\n".join(lines).encode()


def test_errors_tell_nothing_of_the_inside(client: httpx.Client, server: RunningServer) -> None:
    engine = server.served.engine
    assert isinstance(engine, HeldEngine)

    def fail(_: Any) -> None:
        raise DiskReadError("/home/somebody/models/secret.safetensors: read of 4096 bytes at 123 failed")

    engine.hold = fail
    try:
        answer = client.post("/v1/chat/completions", json={"messages": HI})
        assert answer.status_code == 500
        assert "secret" not in answer.text and "home" not in answer.text

        def crash(_: Any) -> None:
            raise RuntimeError("0x7f0012345678 in /home/somebody/code.py")

        engine.hold = crash
        with logs_warning("a request failed"):
            answer = client.post("/v1/chat/completions", json={"messages": HI, "stream": True})
        assert answer.status_code == 500
        assert "0x7f" not in answer.text and "home" not in answer.text
    finally:
        engine.hold = lambda progress: None
    chat(client)


def test_logs_have_no_prompts(client: httpx.Client, caplog: Any) -> None:
    caplog.set_level("DEBUG")
    chat(client, [{"role": "user", "content": "my-secret-of-the-day"}])
    refused(client, "/v1/chat/completions", 400, messages=[{"role": "user", "content": "my-secret-of-the-day"}], n=0)
    client.get("/my-secret-of-the-day?my-secret-of-the-day")
    assert "my-secret-of-the-day" not in "\n".join(
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"host": "0.0.0.0"}, "--api-key-file"),
        ({"host": "192.168.0.7"}, "--api-key-file"),
        ({"host": "::"}, "--api-key-file"),
        ({"api_keys": ("short",)}, "API key"),
        ({"api_keys": ("white space in it",)}, "API key"),
        ({"cors_origins": ("*",)}, "origin"),
        ({"cors_origins": ("https://a.example/path",)}, "origin"),
        ({"allowed_hosts": ("http://a",)}, "host"),
        ({"port": 70000}, "port"),
        ({"queue_size": 0}, "queue_size"),
        ({"timeout_s": -1.0}, "timeout_s"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word) as raised:
        make_server_settings(**options)
    assert "short" not in str(raised.value).replace("too short", "")


def test_another_address_with_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY}\n\n{OTHER_KEY}\n")
    assert read_keys(path) == (KEY, OTHER_KEY)
    assert make_server_settings(host="0.0.0.0", api_keys=read_keys(path)).api_keys == (KEY, OTHER_KEY)
    path.write_text("\n")
    with pytest.raises(UsageError, match="has no key"):
        read_keys(path)


def test_a_port_in_use(server: RunningServer) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(UsageError, match=f"port {port} .* in use"):
        open_socket("127.0.0.1", port)


def test_an_address_that_is_not_of_this_machine() -> None:
    with pytest.raises(UsageError, match="cannot be listened on"):
        open_socket("203.0.113.7", 8000)
