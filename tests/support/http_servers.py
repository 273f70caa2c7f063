"""Servers for tests: the bundled model behind a real socket, in this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from patience import PATIENCE_S

import offmoe
from offmoe.server.serve import RunningServer
from offmoe.server.settings import ServerSettings, make_server_settings

MODEL = "demo_model"
HI = [{"role": "user", "content": "hi"}]


class HeldEngine:
    """An engine whose prompts wait: `hold` is called on its thread before a prompt's progress is passed on."""

    def __init__(self, engine: offmoe.Engine) -> None:
        self._engine = engine
        self.hold: Callable[[Any], None] = lambda progress: None
        self.before_token: Callable[[], None] = lambda: None
        self.num_streams = self.num_ended = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def stream(self, prompt: Any, **options: Any) -> Any:
        return self._held(self._engine.stream, prompt, options)

    def stream_chat(self, messages: Any, **options: Any) -> Any:
        return self._held(self._engine.stream_chat, messages, options)

    def _held(self, begin: Any, prompt: Any, options: dict[str, Any]) -> Any:
        self.num_streams += 1
        tell = options.pop("on_progress")

        def on_progress(progress: Any) -> None:
            self.hold(progress)
            tell(progress)

        return _Counted(self, begin(prompt, on_progress=on_progress, **options))


class _Counted:
    def __init__(self, held: HeldEngine, stream: Any) -> None:
        self._held, self._stream = held, stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Any]:
        for chunk in self._stream:
            self._held.before_token()
            self._held.num_ended += chunk.finish_reason is not None
            yield chunk


@contextmanager
def serving(
    *, settings: ServerSettings | None = None, hold: bool = False, load: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Iterator[RunningServer]:  # fmt: skip
    """The bundled model, loaded, on a free port."""
    settings = settings or make_server_settings(port=0)

    def load_demo(progress: Any) -> Any:
        engine = offmoe.load(**{"ram": "1GiB", "expert_slots": 48, **options}, progress=progress)
        return HeldEngine(engine) if hold else engine

    with RunningServer(settings, load or load_demo, name=MODEL) as server:
        server.start()
        server.wait_until_loaded()
        yield server


def connect(server: RunningServer, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=PATIENCE_S, **options)


def chat(client: httpx.Client, messages: Any = HI, **fields: Any) -> dict[str, Any]:
    """A reply that has to come."""
    answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 8, **fields})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert isinstance(found, dict)
    return found


def refused(client: httpx.Client, path: str, status: int, **fields: Any) -> dict[str, Any]:
    """The error object of a request that is refused."""
    answer = client.post(path, json=fields)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events(client: httpx.Client, path: str, **fields: Any) -> tuple[list[Any], list[str]]:
    """JSON of the events of a stream, and its comments."""
    found, comments = [], []
    with client.stream("POST", path, json={"stream": True, **fields}) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                found.append(json.loads(line.removeprefix("data: ")))
            elif line.startswith(":"):
                comments.append(line)
    return found, comments


def wait_until(is_so: Callable[[], bool]) -> None:
    """Return when it is so; a test fails that waits for ever."""
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


class Gate:
    """Holds the engine's thread in the first prompt that comes until it is opened."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

    def __call__(self, *_: Any) -> None:
        self.reached.set()
        assert self._opened.wait(PATIENCE_S)

    def open(self) -> None:
        self._opened.set()
