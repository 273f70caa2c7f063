"""A prompt that begins like the last one is read from where it differs, and the reply is that of a fresh reading.

Work is counted in rows that experts were given: tokens times top-k, in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compiling import as_captured, lower_with
from engines import PROMPT, open_tiny, save_tiny
from families import build

import offmoe
from offmoe.core.errors import DiskReadError
from offmoe.hf.internals import experts_modules
from offmoe.kv.prefix import longest_with_same_cos_sin

NUM_NEW = 12
MORE = [17, 90, 4, 55, 23, 71, 38]
# What the cache must be able to do: go back (full attention, latent attention), go back a little (windows, of 8 tokens
# here), only go on (running states, short convolutions, indexers).
REWINDS = ["qwen3_moe", "deepseek_v3", "mixtral"]
GOES_ON = ["gpt_oss", "qwen3_next", "granitemoehybrid", "lfm2_moe", "deepseek_v32", "gemma4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("reuse"))


@pytest.fixture
def engine(folder: Path) -> Iterator[offmoe.Engine]:
    with open_tiny(folder) as engine:
        yield engine


def count_rows(engine: offmoe.Engine) -> list[int]:
    """Grows by the number of tokens that each call of the last experts layer is given."""
    rows: list[int] = []
    layer = experts_modules(engine.model)[-1][1]
    layer.register_forward_hook(
        lambda module, given, result: rows.append(given[0].reshape(-1, given[0].shape[-1]).shape[0])
    )
    return rows


def reply(engine: offmoe.Engine, ids: list[int], **options: Any) -> offmoe.Reply:
    return engine.generate(
        ids, **{"max_new_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True, "reuse": True, **options}
    )


def fresh(engine: offmoe.Engine, ids: list[int], **options: Any) -> tuple[int, ...]:
    return reply(engine, ids, reuse=False, **options).token_ids


@pytest.mark.parametrize("name", REWINDS + GOES_ON)
def test_three_turns_give_the_ids_of_a_fresh_reading(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, name)
    with open_tiny(tmp_path) as engine, open_tiny(tmp_path) as other:
        ids = list(PROMPT)
        for turn in range(3):
            got = reply(engine, ids)
            assert got.token_ids == fresh(other, ids)
            kept = len(ids) - 1 - len(MORE) if turn else 0
            assert got.stats.reused_tokens == kept, "all but the last token of the reply, and what is new"
            ids += [*got.token_ids, *MORE]


def test_only_what_is_new_is_read(engine: offmoe.Engine) -> None:
    rows = count_rows(engine)
    first = reply(engine, PROMPT)
    assert rows == [len(PROMPT)] + [1] * (NUM_NEW - 1)
    rows.clear()
    seen: list[tuple[int, int]] = []
    longer = [*PROMPT, *first.token_ids, *MORE]
    second = reply(engine, longer, on_prefill=lambda done, total: seen.append((done, total)))
    num_read = 1 + len(MORE)
    assert rows == [num_read] + [1] * (NUM_NEW - 1)
    assert seen[-1] == (num_read, num_read)
    assert second.stats.prompt_tokens - second.stats.reused_tokens == num_read
    totals = engine.stats()
    assert (totals["prefilled_tokens"], totals["reused_tokens"]) == (len(PROMPT) + num_read, len(longer) - num_read)
    assert second.stats.prefill.lookups <= num_read * 2 * 2, "two layers, top-2"


@pytest.mark.parametrize("common", [1, 9, 10, 11, 15])
def test_a_prompt_that_differs_is_read_from_there(engine: offmoe.Engine, common: int) -> None:
    said = reply(engine, PROMPT).token_ids
    held = [*PROMPT, *said]
    asked = [*held[:common], (held[common] + 1) % 128, *MORE]
    got = reply(engine, asked, reuse=True)
    assert got.stats.reused_tokens == common
    assert got.token_ids == fresh(engine, asked)
    assert reply(engine, asked[:7], reuse=True).stats.reused_tokens == 6, "the last id is read, for what follows it"


def test_a_repeated_prompt_starts_from_its_own_logits(engine: offmoe.Engine) -> None:
    rows = count_rows(engine)
    first = reply(engine, PROMPT)
    rows.clear()
    again = reply(engine, PROMPT, reuse=True)
    assert again.token_ids == first.token_ids
    assert again.stats.reused_tokens == len(PROMPT) and rows == [1] * (NUM_NEW - 1)
    assert reply(engine, PROMPT, reuse=True, max_new_tokens=3).token_ids == first.token_ids[:3]


def test_unasked_only_what_has_the_bits_of_a_fresh_reading_is_reused(engine: offmoe.Engine) -> None:
    said = reply(engine, PROMPT, reuse=None).token_ids
    assert reply(engine, PROMPT, reuse=None).stats.reused_tokens == len(PROMPT), "all of it, with its logits"
    assert reply(engine, [*PROMPT[:5], *MORE], reuse=None).stats.reused_tokens == 0
    reply(engine, PROMPT)
    assert reply(engine, [*PROMPT, said[0], 3], reuse=None).stats.reused_tokens == 0, "no whole block"
    reply(engine, PROMPT)
    assert reply(engine, [*PROMPT, *MORE], reuse=False).stats.reused_tokens == 0


def test_where_rounding_must_not_vary_nothing_is_reused(folder: Path) -> None:
    with open_tiny(folder, placement_invariant=True) as engine:
        reply(engine, PROMPT)
        assert reply(engine, [*PROMPT, *MORE], reuse=None).stats.reused_tokens == 0


@pytest.mark.parametrize("name", GOES_ON)
def test_states_that_cannot_go_back_are_made_anew(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, name)
    with open_tiny(tmp_path) as engine, open_tiny(tmp_path) as other:
        reply(engine, PROMPT, max_new_tokens=30)
        asked = [*PROMPT[:8], *MORE]
        got = reply(engine, asked, reuse=True)
        assert got.stats.reused_tokens == 0
        assert got.token_ids == fresh(other, asked)


def test_a_window_goes_back_as_far_as_it_holds(tmp_path: Path) -> None:
    save_tiny(tmp_path, "gpt_oss")
    with open_tiny(tmp_path) as engine, open_tiny(tmp_path) as other:
        reused = set()
        for back in range(1, 12):
            held = [*PROMPT, *reply(engine, PROMPT, max_new_tokens=14, reuse=False).token_ids[:-1]]
            asked = [*held[:-back], *MORE]
            got = reply(engine, asked, reuse=True)
            assert got.token_ids == fresh(other, asked)
            assert got.stats.reused_tokens in {0, len(held) - back}
            reused.add(got.stats.reused_tokens > 0)
        assert reused == {True, False}, "both were tried"


def test_compiled_steps_leave_a_cache_that_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower_with(monkeypatch, as_captured)
    with open_tiny(folder, compile="on") as engine, open_tiny(folder) as other:
        ids = list(PROMPT)
        for turn in range(3):
            got = reply(engine, ids)
            assert (got.stats.reused_tokens > 0) == (turn > 0)
            assert got.token_ids == fresh(other, ids)
            ids += [*got.token_ids, *MORE]
        assert engine.stats()["compile"] == "on"


def test_what_a_failed_read_broke_off_is_read_again(folder: Path) -> None:
    """The first piece of the prompt stays; what was half-way through the layers does not."""
    asked = [*PROMPT, *MORE, 9, 9]
    with open_tiny(folder, prefill_chunk=8) as engine:
        layer = experts_modules(engine.model)[-1][1]
        calls: list[int] = []

        def fail(*_: object) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise DiskReadError("a read failed")

        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(DiskReadError):
            reply(engine, asked)
        hook.remove()
        got = reply(engine, asked, reuse=True)
        assert got.stats.reused_tokens == 8
        assert got.token_ids == fresh(engine, asked)


def test_a_stream_left_half_way_leaves_what_it_read(engine: offmoe.Engine) -> None:
    stream = engine.stream(PROMPT, max_new_tokens=50, ignore_eos=True)
    said = [next(stream).token_ids[0] for _ in range(5)]
    stream.close()
    asked = [*PROMPT, *(token for token in said if token is not None), *MORE]
    got = reply(engine, asked)
    assert got.stats.reused_tokens == len(PROMPT) + 4
    assert got.token_ids == fresh(engine, asked)


def test_of_two_streams_each_finds_the_cache_as_it_is_when_it_begins(engine: offmoe.Engine) -> None:
    reply(engine, PROMPT)
    streams = [engine.stream([*PROMPT, *ids], max_new_tokens=4, ignore_eos=True) for ids in (MORE, [3, 3])]
    expected = [fresh(engine, [*PROMPT, *ids], max_new_tokens=4) for ids in (MORE, [3, 3])]
    for stream, ids in reversed(list(zip(streams, expected, strict=True))):
        assert tuple(id_ for piece in stream for id_ in piece.token_ids) == ids


def test_angles_that_depend_on_the_length(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    assert longest_with_same_cos_sin(model) is None
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 24}
    assert longest_with_same_cos_sin(model) == 24
    model.config.rope_parameters = {"full": {"rope_type": "default"}, "sliding": {"rope_type": "dynamic"}}
    assert longest_with_same_cos_sin(model) == model.config.max_position_embeddings
