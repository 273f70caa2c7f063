"""The engine as a program uses it: load, generate, stream, chat, and what it answers to a wrong call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import PROMPT, QUARTER, TINY_EXPERTS, assert_at_rest, leaves_nothing, open_tiny, plain_model, save_tiny
from makers import one_line
from patience import PATIENCE_S

import offmoe
from offmoe.core.errors import ContextLengthError, EngineBusyError, EngineClosedError, UsageError

TEXT = "def read_lines(path):\n    "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[offmoe.Engine]:
    """One engine for the tests that only generate; each leaves it idle."""
    with open_tiny(folder, context_length=64) as engine:
        yield engine


@pytest.fixture(scope="module")
def demo() -> Iterator[offmoe.Engine]:
    """The bundled model with a quarter of its experts. Its weights may change, so no test knows its words."""
    with offmoe.load(ram="4GiB", expert_slots=48) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _idle_again(shared: offmoe.Engine, demo: offmoe.Engine) -> Iterator[None]:
    yield
    for engine in (shared, demo):
        assert_at_rest(engine)
        engine.generate(PROMPT, max_new_tokens=1)


def test_greedy_ids_are_those_of_transformers(shared: offmoe.Engine, folder: Path) -> None:
    expected = plain_model(folder).generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)
    reply = shared.generate(PROMPT, max_new_tokens=24)
    assert list(reply.token_ids) == expected[0, len(PROMPT) :].tolist()
    assert reply.finish_reason == "length" and reply.text == ""


def test_a_model_without_tokenizer_takes_ids_only(shared: offmoe.Engine) -> None:
    assert shared.tokenizer is None
    for call in (lambda: shared.generate("text"), lambda: shared.chat([{"role": "user", "content": "hi"}])):
        with pytest.raises(UsageError, match="no tokenizer") as caught:
            call()
        one_line(caught)
    with pytest.raises(UsageError, match="stop strings cannot be found"):
        shared.generate(PROMPT, stop="x")


@pytest.mark.parametrize(
    "prompt", [np.array(PROMPT), torch.tensor(PROMPT), tuple(PROMPT)], ids=["numpy", "torch", "tuple"]
)
def test_ids_may_be_any_sequence_of_whole_numbers(shared: offmoe.Engine, prompt: Any) -> None:
    assert shared.generate(prompt, max_new_tokens=3).token_ids == shared.generate(PROMPT, max_new_tokens=3).token_ids


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([3, 128], "128 is not in the vocabulary of 128"),
        ([-1], "-1 is not in the vocabulary of 128"),
        ([1.5], "sequence of token ids"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_prompts_that_are_none(shared: offmoe.Engine, prompt: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        shared.generate(prompt)
    one_line(caught)


def test_pieces_join_to_the_reply(demo: offmoe.Engine) -> None:
    pieces = list(demo.stream(TEXT, max_new_tokens=40, ignore_eos=True))
    reply = demo.generate(TEXT, max_new_tokens=40, ignore_eos=True)
    assert "".join(piece.text for piece in pieces) == reply.text != ""
    ids = [id_ for piece in pieces for id_ in piece.token_ids]
    assert tuple(ids) == reply.token_ids and len(ids) == 40
    assert demo.tokenizer is not None
    assert reply.text == demo.tokenizer.decode(ids, skip_special_tokens=True)
    assert [piece.stats is not None for piece in pieces] == [False] * 40 + [True]
    assert [piece.finish_reason for piece in pieces[-2:]] == [None, "length"]


def test_stats_count_what_was_done(demo: offmoe.Engine) -> None:
    before = demo.stats()
    stats = demo.generate(TEXT, max_new_tokens=5, ignore_eos=True).stats
    after = demo.stats()
    assert demo.tokenizer is not None
    assert (stats.prompt_tokens, stats.new_tokens, len(stats.step_s)) == (len(demo.tokenizer(TEXT)["input_ids"]), 5, 4)
    for name in ("hits", "misses", "disk_bytes", "disk_reads"):
        assert after[name] - before[name] == getattr(stats.prefill, name) + getattr(stats.decode, name)
    # Four decoded tokens, six layers, top-4: each expert asked for is a hit or a miss.
    assert stats.decode.lookups == 4 * 6 * 4
    assert after["experts_cached"] == 48 and after["experts_total"] == 192


def test_the_end_token_ends(demo: offmoe.Engine) -> None:
    ends = demo.model.generation_config.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    given = iter([100, 200, end, 300])
    reply = demo.generate(TEXT, max_new_tokens=9, choose=lambda ids, logits: next(given))
    assert (reply.token_ids, reply.finish_reason, reply.stats.new_tokens) == ((100, 200), "stop", 3)


def test_chat_goes_through_the_template(demo: offmoe.Engine) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    assert demo.tokenizer is not None
    ids = demo.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = demo.generate(ids, max_new_tokens=12)
    reply = demo.chat(messages, max_new_tokens=12)
    assert (reply.token_ids, reply.stats.prompt_tokens) == (expected.token_ids, len(ids))
    assert "".join(piece.text for piece in demo.stream_chat(messages, max_new_tokens=12)) == reply.text


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "user"}], [{"role": "pirate", "content": "arr"}], ["hi"], [{"role": "user", "content": 3}]],
)
def test_conversations_that_are_none(demo: offmoe.Engine, messages: Any) -> None:
    with pytest.raises(UsageError) as caught:
        demo.chat(messages)
    one_line(caught)


def test_broken_text_is_refused(demo: offmoe.Engine) -> None:
    for call in (lambda: demo.generate("caf\udce9"), lambda: demo.chat([{"role": "user", "content": "caf\udce9"}])):
        with pytest.raises(UsageError, match="character 3") as caught:
            call()
        one_line(caught)


def test_unknown_option_names_the_known(shared: offmoe.Engine) -> None:
    with pytest.raises(UsageError, match=r"'max_tokens'; did you mean 'max_new_tokens'\?.*temperature.*seed"):
        shared.generate(PROMPT, max_tokens=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'contextlength'"):
        offmoe.load(contextlength=5)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True])
def test_max_new_tokens_is_a_whole_number(shared: offmoe.Engine, value: Any) -> None:
    with pytest.raises(UsageError, match=r"max_new_tokens is .*at least 1"):
        shared.generate(PROMPT, max_new_tokens=value)


def test_context_length_is_a_limit_with_numbers(shared: offmoe.Engine) -> None:
    assert shared.context_length == 64
    with pytest.raises(ContextLengthError, match=r"prompt has 64 tokens, the context 64.*--context-length") as caught:
        shared.generate([7] * 64)
    one_line(caught)
    reply = shared.generate([7] * 63, max_new_tokens=5)
    assert (len(reply.token_ids), reply.finish_reason) == (1, "length")
    reply = shared.generate([7] * 60, max_new_tokens=4)
    assert (len(reply.token_ids), reply.finish_reason) == (4, "length")
    reply = shared.generate([7] * 10)
    assert (len(reply.token_ids), reply.finish_reason) == (54, "length")


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_a_prompt_in_pieces_is_the_whole_prompt(folder: Path, shared: offmoe.Engine, chunk: int) -> None:
    prompt = [(11 * i) % 120 + 3 for i in range(16)]
    expected = shared.generate(prompt, max_new_tokens=12).token_ids
    seen: list[int] = []
    with open_tiny(folder, prefill_chunk=chunk) as engine:
        assert engine.plan.prefill_chunk == chunk
        got = engine.generate(prompt, max_new_tokens=12, on_prefill=lambda done, total: seen.append(done)).token_ids
    assert got == expected
    assert seen == sorted(seen) and seen[-1] == 16 and set(range(chunk, 16, chunk)) <= set(seen)


def test_one_generation_at_a_time(shared: offmoe.Engine) -> None:
    stream = shared.stream(PROMPT, max_new_tokens=5)
    next(stream)
    for call in (lambda: shared.generate(PROMPT), lambda: shared.stream(PROMPT)):
        with pytest.raises(EngineBusyError, match="finish or close that stream"):
            call()
    caught: list[BaseException] = []

    def elsewhere() -> None:
        try:
            shared.generate(PROMPT)
        except EngineBusyError as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(caught) == 1
    assert len(list(stream)) == 5, "the stream itself is not disturbed"


def test_of_two_streams_the_second_to_begin_is_refused(shared: offmoe.Engine) -> None:
    first, second = shared.stream(PROMPT, max_new_tokens=2), shared.stream(PROMPT, max_new_tokens=2)
    next(second)
    with pytest.raises(EngineBusyError):
        next(first)
    second.close()


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_stream_left_half_way_frees_the_engine(shared: offmoe.Engine, how: str) -> None:
    expected = shared.generate(PROMPT, max_new_tokens=4).token_ids
    stream = shared.stream(PROMPT, max_new_tokens=50)
    next(stream)
    if how == "close":
        stream.close()
    del stream
    assert shared.generate(PROMPT, max_new_tokens=4).token_ids == expected


def test_a_closed_engine_says_so(folder: Path) -> None:
    with leaves_nothing():
        engine = open_tiny(folder)
        model, stream = engine.model, engine.stream(PROMPT)
        started = engine.stream(PROMPT)
        next(started)
        engine.close()
        engine.close()
        assert repr(engine) == f"<Engine {folder.name} [closed]>"
        for call in (
            lambda: engine.generate(PROMPT), lambda: engine.model, engine.stats, lambda: next(stream),
            lambda: next(started), lambda: model.generate(torch.tensor([PROMPT]), max_new_tokens=2),
        ):  # fmt: skip
            with pytest.raises(EngineClosedError, match="closed"):
                call()


def test_closing_from_another_thread_ends_the_stream(folder: Path) -> None:
    with leaves_nothing():
        engine = open_tiny(folder)
        first, closed = threading.Event(), threading.Event()
        caught: list[BaseException] = []

        def consume() -> None:
            try:
                for _ in engine.stream(PROMPT, max_new_tokens=200, ignore_eos=True):
                    first.set()
                    closed.wait(PATIENCE_S)
            except EngineClosedError as error:
                caught.append(error)

        thread = threading.Thread(target=consume)
        thread.start()
        assert first.wait(PATIENCE_S)
        engine.close()
        closed.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive() and len(caught) == 1


def test_engines_side_by_side(folder: Path, tmp_path: Path, shared: offmoe.Engine) -> None:
    other_folder = save_tiny(tmp_path / "other", "mixtral", seed=3)
    alone = {
        path: plain_model(path).generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
        for path in (folder, other_folder)
    }
    with leaves_nothing(), open_tiny(other_folder) as other, open_tiny(folder, expert_slots=TINY_EXPERTS) as same:
        engines = [(shared, folder), (other, other_folder), (same, folder)]
        streams = [engine.stream(PROMPT, max_new_tokens=12) for engine, _ in engines]
        turns = zip(*streams, strict=True)
        ids = [[id_ for piece in pieces[:-1] for id_ in piece.token_ids] for pieces in zip(*turns, strict=True)]
        assert ids == [alone[path][0, len(PROMPT) :].tolist() for _, path in engines]
        other.close()
        assert same.generate(PROMPT, max_new_tokens=12).token_ids == tuple(ids[2]), "a neighbour's end is not its own"
    assert shared.stats()["experts_cached"] == QUARTER


def test_load_reports_progress(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with open_tiny(folder, progress=lambda *what: seen.append(what)) as engine:
        weights_bytes = sum(parameter.nbytes for parameter in engine.model.parameters())
    assert ("resident weights", weights_bytes, weights_bytes) in seen
    assert [what for what, _, total in seen if not total][-1] == "preparing expert slots", "each wait has a name"


def test_an_engine_names_what_it_holds(folder: Path) -> None:
    with open_tiny(folder) as engine:
        assert repr(engine).startswith(
            f"<Engine {folder.name} [<ExpertCache [slots: 0 ready, 0 filling, {QUARTER} free"
        )
        engine.generate(PROMPT, max_new_tokens=2)
        assert f"slots: {QUARTER} ready" in repr(engine)
