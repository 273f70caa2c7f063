"""Damaged files end in an OffmoeError of one line: the fuzzer's seeds again, and some inputs made from them.

`scripts/fuzz` goes on for as long as one likes; what it found is among the seeds, by the name `found_...`.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from fuzzing.rule import Outcome, try_input
from fuzzing.targets import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import one_line

from offmoe.core.errors import CheckpointError, OffmoeError
from offmoe.hf.tokens.tokenizing import tokenizing

SEEDS = [(target.name, path.name) for target in TARGETS.values() for path in target.seeds()]


def outcome(name: str, data: bytes) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return try_input(TARGETS[name].read, data, Path(folder))


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """Import what inputs need: it is no input's time and memory."""
    for name in ("gguf_model", "model", "tokenizer"):
        outcome(name, TARGETS[name].seeds()[0].read_bytes())


@pytest.mark.parametrize(("name", "seed"), SEEDS, ids=[f"{name}-{seed}" for name, seed in SEEDS])
def test_a_seed_keeps_the_rule(name: str, seed: str) -> None:
    found = outcome(name, next(path for path in TARGETS[name].seeds() if path.name == seed).read_bytes())
    assert found.broken is None, found.details
    assert found.signature == "read" or seed.startswith("found_"), "a seed that is refused tries nothing"


@pytest.mark.parametrize("name", TARGETS)
def test_varied_seeds_keep_the_rule(name: str) -> None:
    seeds = [path.read_bytes() for path in TARGETS[name].seeds()]

    @settings(max_examples=8, database=None)
    @given(st.integers(0, 1 << 32))
    def vary(number: int) -> None:
        rng = random.Random(number)
        found = outcome(name, TARGETS[name].mutate(rng.choice(seeds), rng, seeds))
        assert found.broken is None, found.details

    vary()


def test_the_rule_is_broken_by_another_error_a_hang_and_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzzing.rule.MOST_CPU_S", 0.05)

    def read(data: bytes, folder: Path) -> None:
        match data:
            case b"error":
                raise KeyError("x")
            case b"hang":
                while True:
                    pass
            case b"memory":
                bytearray(1 << 31)
            case b"lines":
                raise OffmoeError("a\nb")

    broken = {data: try_input(read, data, Path()).broken for data in (b"error", b"hang", b"memory", b"lines", b"fine")}
    assert [str(text).partition(" at ")[0] for text in broken.values()] == [
        "builtins.KeyError", "fuzzing.rule.HangError", "builtins.MemoryError", "None", "None",
    ]  # fmt: skip


def test_messages_are_one_line_of_bounded_length_whatever_a_file_puts_into_them() -> None:
    assert str(OffmoeError("tensor 'a\nb\x00\ud800' is \u00e9")) == "tensor 'a\\nb\\x00\\ud800' is \u00e9"
    text = str(OffmoeError("begin " + "x" * 100_000 + " end"))
    assert text.startswith("begin x")
    assert text.endswith("x end")
    assert len(text) < 1600


class PanicException(BaseException):
    """As the tokenizers library raises for a failed assertion of its Rust code."""


def test_failures_of_the_tokenizers_library_are_errors_of_the_checkpoint() -> None:
    for error in (Exception("no unk_id"), PanicException("no entry\nfound for key")):
        with pytest.raises(CheckpointError) as caught, tokenizing("m"):
            raise error
        assert one_line(caught).startswith("m has a tokenizer that cannot be read: no ")
    for kept in (KeyboardInterrupt(), OffmoeError("x"), MemoryError()):
        with pytest.raises(type(kept)), tokenizing("m"):
            raise kept
