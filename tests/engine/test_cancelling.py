"""A stream that is closed from another thread ends: in its prompt after one layer, between tokens at the next one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import PROMPT, assert_at_rest, open_tiny, save_speaking, save_tiny

import offmoe
from offmoe.hf.internals import experts_modules
from offmoe.sampling.params import PrefillProgress

LONG = [(i * 37 + 5) % 128 for i in range(96)]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[offmoe.Engine]:
    save_tiny(tmp_path)
    with open_tiny(tmp_path, prefill_chunk=32) as engine:
        yield engine


def test_in_the_prompt_after_the_layer_at_work(engine: offmoe.Engine) -> None:
    layers = experts_modules(engine.model)
    calls: list[int] = []
    reached, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            reached.set()
            go_on.wait(30)

    hook = layers[0][1].register_forward_pre_hook(wait)
    stream = engine.stream(LONG, max_new_tokens=4)
    got: list[offmoe.Chunk] = []
    reader = threading.Thread(target=lambda: got.extend(stream))
    reader.start()
    assert reached.wait(30)
    stream.close()
    go_on.set()
    reader.join(30)
    hook.remove()
    assert not reader.is_alive() and got == [] and stream.is_closed
    assert len(calls) == 1, "no other layer of the three pieces was begun"
    assert_at_rest(engine)
    fresh = engine.generate(LONG, max_new_tokens=4, reuse=False)
    assert engine.generate(LONG, max_new_tokens=4, reuse=True).token_ids == fresh.token_ids


def test_a_stream_closed_before_it_begins_reads_nothing(engine: offmoe.Engine) -> None:
    told: list[tuple[int, int]] = []
    stream = engine.stream(LONG, on_prefill=lambda done, total: told.append((done, total)))
    stream.close()
    assert list(stream) == [] and told == []
    assert engine.generate(PROMPT, max_new_tokens=2).token_ids


def test_a_chat_ends_too(tmp_path: Path) -> None:
    with offmoe.load(save_speaking(tmp_path / "speaking"), ram="4GiB") as engine:
        reached = threading.Event()
        chat = engine.conversation()
        stream = chat.stream("hello", max_new_tokens=4, on_prefill=lambda done, total: close(done))

        def close(done: int) -> None:
            if not reached.is_set():
                reached.set()
                stream.close()  # the prompt's own thread may do it as well: the generator is at work then

        assert list(stream) == [] and reached.is_set() and chat.messages == []
        assert chat.ask("hello", max_new_tokens=4).token_ids


def test_progress_tells_tokens_and_bytes(engine: offmoe.Engine) -> None:
    seen: list[PrefillProgress] = []
    engine.generate(LONG, max_new_tokens=1, on_progress=seen.append, reuse=False)
    assert (seen[0].done_tokens, seen[0].total_tokens, seen[0].disk_bytes) == (0, len(LONG), 0)
    assert seen[-1].done_tokens == len(LONG) and seen[-1].disk_bytes > 0
    assert [each.done_tokens for each in seen] == sorted(each.done_tokens for each in seen)
    assert all(a.elapsed_s <= b.elapsed_s for a, b in zip(seen, seen[1:], strict=False))


def test_what_the_callers_function_raises_ends_the_request(engine: offmoe.Engine) -> None:
    class LeftError(Exception):
        pass

    def leave(progress: PrefillProgress) -> None:
        if progress.done_tokens:
            raise LeftError

    with pytest.raises(LeftError):
        engine.generate(LONG, on_progress=leave)
    assert_at_rest(engine)
    assert engine.generate(LONG, max_new_tokens=2).token_ids


def test_a_queued_request_is_checked_at_once_and_begins_when_it_is_asked(engine: offmoe.Engine) -> None:
    first = engine.stream(PROMPT, max_new_tokens=3, ignore_eos=True)
    next(first)
    second = engine.stream(LONG, max_new_tokens=2, ignore_eos=True, queued=True)
    assert second.prompt_ids == tuple(LONG)
    with pytest.raises(offmoe.UsageError, match="temperature"):
        engine.stream(LONG, temperature=-1, queued=True)
    with pytest.raises(offmoe.EngineBusyError):
        engine.stream(LONG)
    assert len(list(first)) == 3
    assert sum(len(chunk.token_ids) for chunk in second) == 2
