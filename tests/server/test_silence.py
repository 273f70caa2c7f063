"""Long prompts and clients that leave: bytes never stop, nobody's work goes on for nobody, and the queue is fair."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from http_servers import HI, Gate, HeldEngine, chat, connect, events, serving, wait_until
from logs import logs_warning

from offmoe.server import responses
from offmoe.server.serve import RunningServer
from offmoe.server.settings import make_server_settings

LONG = [{"role": "user", "content": "one two three " * 60}]


@pytest.fixture
def server() -> Iterator[RunningServer]:
    settings = make_server_settings(port=0, queue_size=3, api_keys=("a" * 8, "b" * 8))
    with serving(settings=settings, hold=True) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with connect(server, headers={"x-api-key": "a" * 8}) as opened:
        yield opened


@pytest.fixture
def engine(server: RunningServer) -> HeldEngine:
    held = server.served.engine
    assert isinstance(held, HeldEngine)
    return held


def begin(client: httpx.Client, **fields: Any) -> Any:
    """A request that is open: its response's headers are there."""
    request = client.build_request(
        "POST", "/v1/chat/completions", json={"messages": HI, "stream": True, "max_tokens": 400, **fields}
    )
    return client.send(request, stream=True)


def test_a_slow_prompt_has_comments_from_the_first_second_and_completes_once(
    client: httpx.Client, engine: HeldEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of many times the client's patience: node's is 300 s, here it is a second."""
    monkeypatch.setattr(responses, "_COMMENT_S", 0.1)
    monkeypatch.setattr(responses, "_FIRST_S", 0.1)
    engine.hold = lambda progress: time.sleep(0.4)
    impatient = {"timeout": httpx.Timeout(60, read=1.0)}
    request = {"messages": LONG, "max_tokens": 3, "stream": True}
    lines = []
    begun = time.monotonic()
    with client.stream("POST", "/v1/chat/completions", json=request, **impatient) as answer:  # type: ignore[arg-type]
        lines = list(answer.iter_lines())
    assert time.monotonic() - begun > 2.0, "the prompt was no slow one"
    comments = [line for line in lines if line.startswith(": ")]
    assert sum("prompt" in line and "tokens" in line for line in comments) > 5
    assert lines[-2] == "data: [DONE]"
    assert engine.num_streams == engine.num_ended == 1


def test_a_reply_as_a_whole_is_never_silent_either(
    client: httpx.Client, engine: HeldEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "_COMMENT_S", 0.1)
    monkeypatch.setattr(responses, "_SPACE_S", 0.2)
    engine.hold = lambda progress: time.sleep(0.4)
    answer = client.post(
        "/v1/chat/completions", json={"messages": LONG, "max_tokens": 3}, timeout=httpx.Timeout(60, read=1.0)
    )
    assert answer.text.startswith("  ")
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert engine.num_streams == 1


def test_progress_comes_as_events_where_it_is_asked_for(client: httpx.Client) -> None:
    chunks, _ = events(client, "/v1/chat/completions", messages=LONG, max_tokens=2, return_progress=True)
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert told[-1]["processed"] == told[-1]["total"] > 60
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)


def test_a_client_that_leaves_in_the_prompt_stops_it(client: httpx.Client, engine: HeldEngine) -> None:
    gate = Gate()
    engine.hold = gate
    open_request = begin(client)
    assert gate.reached.wait(60)
    engine.hold = lambda progress: None
    open_request.close()
    queue = client
    wait_until(lambda: _metric(queue, "offmoe_requests_cancelled_total") == 1)
    gate.open()
    wait_until(lambda: _metric(client, "offmoe_requests_running") == 0)
    assert engine.num_ended == 0
    chat(client)


def test_a_client_that_leaves_in_decoding_stops_it(client: httpx.Client, engine: HeldEngine) -> None:
    engine.before_token = lambda: time.sleep(0.02)
    open_request = begin(client, ignore_eos=True)
    lines = open_request.iter_lines()
    assert any("content" in line for line in lines)
    open_request.close()
    wait_until(lambda: _metric(client, "offmoe_requests_running") == 0)
    assert engine.num_ended == 0, "400 tokens take eight seconds"
    engine.before_token = lambda: None
    chat(client)


def test_a_client_that_leaves_while_it_waits_for_json_stops_it(client: httpx.Client, engine: HeldEngine) -> None:
    engine.before_token = lambda: time.sleep(0.02)
    with pytest.raises(httpx.ReadTimeout):
        client.post(
            "/v1/chat/completions", json={"messages": HI, "max_tokens": 400, "ignore_eos": True},
            timeout=httpx.Timeout(60, read=0.3),
        )  # fmt: skip
    wait_until(lambda: _metric(client, "offmoe_requests_running") == 0)
    assert engine.num_ended == 0


def test_a_client_that_leaves_the_queue_is_never_begun(client: httpx.Client, engine: HeldEngine) -> None:
    gate = Gate()
    engine.hold = gate
    first = begin(client)
    assert gate.reached.wait(60)
    waiting = begin(client)
    assert "in the queue, 1 before" in next(line for line in waiting.iter_lines() if line)
    waiting.close()
    wait_until(lambda: _metric(client, "offmoe_requests_waiting") == 0)
    gate.open()
    first.read()
    wait_until(lambda: _metric(client, "offmoe_requests_running") == 0)
    assert engine.num_ended == 1


def test_a_full_queue_says_when_to_come_back(client: httpx.Client, engine: HeldEngine) -> None:
    gate = Gate()
    engine.hold = gate
    opened = [begin(client)]
    assert gate.reached.wait(60)
    opened += [begin(client, max_tokens=2) for _ in range(3)]
    answer = client.post("/v1/chat/completions", json={"messages": HI})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "queue_full"
    gate.open()
    for each in opened:
        assert "[DONE]" in each.read().decode()


def test_keys_take_turns(server: RunningServer, client: httpx.Client, engine: HeldEngine) -> None:
    """One key's two requests are there before the other's one, which comes before the second nevertheless."""
    gate = Gate()
    engine.hold = gate
    first = begin(client, max_tokens=1)
    assert gate.reached.wait(60)
    lengths: list[int] = []

    def ask(key: str, length: int) -> None:
        with connect(server, headers={"x-api-key": key * 8}) as other:
            chat(other, [{"role": "user", "content": "word " * length}], max_tokens=1)

    with ThreadPoolExecutor(3) as pool:
        asked: list[Any] = []
        for key, length in (("a", 50), ("a", 100), ("b", 200)):
            asked.append(pool.submit(ask, key, length))
            wait_until(lambda: len(server.served.queue) == len(asked))
        engine.hold = lambda progress: lengths.append(progress.total_tokens + progress.reused_tokens)
        gate.open()
        for each in asked:
            each.result()
    first.read()
    begun = list(dict.fromkeys(length for length in lengths if length > 50))
    assert begun == [begun[0], max(begun), begun[2]] and len(begun) == 3


def test_a_template_that_raises_is_told_before_a_token(
    client: httpx.Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        server.served.engine.tokenizer, "chat_template", "{{ raise_exception('roles have to take turns') }}"
    )
    for stream in (False, True):
        answer = client.post("/v1/chat/completions", json={"messages": HI, "stream": stream})
        assert answer.status_code == 400
        assert "roles have to take turns" in answer.json()["error"]["message"]


def test_a_failed_request_does_not_end_the_server(client: httpx.Client, engine: HeldEngine) -> None:
    def fail() -> None:
        raise ValueError("what nobody foresaw")

    engine.before_token = fail
    with logs_warning("a request failed"):
        answer = client.post("/v1/chat/completions", json={"messages": HI, "stream": True})
    assert answer.status_code == 500
    engine.before_token = lambda: None
    chat(client)


def test_an_error_in_the_middle_is_an_event(client: httpx.Client, engine: HeldEngine) -> None:
    tokens = iter(range(3))

    def fail_at_fourth() -> None:
        time.sleep(0.4)
        if next(tokens, None) is None:
            raise ValueError("what nobody foresaw")

    engine.before_token = fail_at_fourth
    with logs_warning("a request failed"):
        chunks, _ = events(client, "/v1/chat/completions", messages=HI, max_tokens=30, ignore_eos=True)
    assert chunks[-1]["error"]["code"] == "internal_error"
    assert "foresaw" not in str(chunks[-1])


def test_the_end_of_the_server_ends_streams_with_a_reason(server: RunningServer, engine: HeldEngine) -> None:
    engine.before_token = lambda: time.sleep(0.02)
    with connect(server, headers={"x-api-key": "a" * 8}) as client:
        running = begin(client, ignore_eos=True, stream_options={"include_usage": True})
        lines = running.iter_lines()
        assert any("content" in line for line in lines)
        waiting = begin(client)
        ending = threading.Thread(target=server.close)
        ending.start()
        rest = [line for line in lines if line.startswith("data: ")]
        assert '"finish_reason":"length"' in rest[-3] and '"completion_tokens"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert "shutting down" in waiting.read().decode()
        ending.join(60)
    assert not ending.is_alive()


def test_time_of_a_request_is_limited() -> None:
    with serving(settings=make_server_settings(port=0, timeout_s=0.5), hold=True) as server, connect(server) as client:
        engine = server.served.engine
        assert isinstance(engine, HeldEngine)
        engine.before_token = lambda: time.sleep(0.05)
        reply = chat(client, max_tokens=400, ignore_eos=True)
        assert reply["choices"][0]["finish_reason"] == "length"
        assert 1 < reply["usage"]["completion_tokens"] < 100
        engine.hold = lambda progress: time.sleep(0.2)
        answer = client.post("/v1/chat/completions", json={"messages": LONG})
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")


def test_while_the_model_loads_health_says_how_far_it_is() -> None:
    gate = Gate()

    def load(progress: Any) -> Any:
        progress("reading weights", 30, 100)
        gate()
        raise MemoryError

    server = RunningServer(make_server_settings(port=0), load, name="m")

    def run() -> None:
        with pytest.raises(MemoryError):
            server.run()

    thread = threading.Thread(target=run)
    thread.start()
    assert gate.reached.wait(60)
    with connect(server) as client:
        answer = client.get("/health")
        assert answer.status_code == 503
        assert answer.json()["progress"] == {"stage": "reading weights", "done_bytes": 30, "total_bytes": 100}
        refused = client.post("/v1/chat/completions", json={"messages": HI})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_loading")
        assert "30%" in refused.json()["error"]["message"]
    gate.open()
    thread.join(60)
    assert not thread.is_alive(), "a load that failed ends the server"


def _metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.split()[0] == name))
