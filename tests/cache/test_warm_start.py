"""Counts of uses from run to run: what is kept, and that nothing in the file or the folder can do harm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from logs import logs_warning

import offmoe
from offmoe.cache.usage import Usage
from offmoe.cache.warm_start import MAX_COUNT, WarmStart
from offmoe.core.folders import cache_folder
from offmoe.core.keys import ExpertKey

HASH = "ab" * 32
EXPERTS = (3, 2)


def warm_start(folder: Path, model_hash: str = HASH) -> WarmStart:
    return WarmStart(model_hash, EXPERTS, folder=folder)


def used(**counts: int) -> Usage:
    """`a3=5`: expert 3 of layer 0 was used 5 times; `b` is layer 1."""
    usage = Usage({ExpertKey("ab".index(name[0]), int(name[1:])): count for name, count in counts.items()})
    usage.token_pass()
    return usage


def test_counts_come_back(tmp_path: Path) -> None:
    warm_start(tmp_path).save(used(a2=5, b0=1))
    assert warm_start(tmp_path).load() == {ExpertKey(0, 2): 5, ExpertKey(1, 0): 1}
    assert [path.name for path in (tmp_path / "usage").iterdir()] == [f"{HASH[:32]}.json"]


def test_of_two_tiers_the_larger_count_is_kept(tmp_path: Path) -> None:
    warm_start(tmp_path).save(used(a0=5, a1=1), used(a1=7, b1=MAX_COUNT + 1))
    assert warm_start(tmp_path).load() == {ExpertKey(0, 0): 5, ExpertKey(0, 1): 7, ExpertKey(1, 1): MAX_COUNT}


def test_nothing_used_nothing_written(tmp_path: Path) -> None:
    warm_start(tmp_path).save(Usage({ExpertKey(0, 0): 3}))
    assert not list(tmp_path.iterdir())
    assert warm_start(tmp_path).load() == {}


WHOLE = {"version": 1, "model_hash": HASH, "counts": [[1, 2, 3], [4, 5]]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[]", "version 1"),
        (json.dumps(WHOLE | {"version": 2}), "version 1"),
        (json.dumps(WHOLE | {"model_hash": "cd" * 32}), "another model"),
        (json.dumps(WHOLE | {"counts": [[1, 2, 3]]}), "2 layers"),
        (json.dumps(WHOLE | {"counts": [[1, 2, 3], [4]]}), "2 experts"),
        (json.dumps(WHOLE | {"counts": [[1, 2, 3], {"0": 1, "1": 2}]}), "2 experts"),
        (json.dumps(WHOLE | {"counts": [[1, 2, -3], [4, 5]]}), "a count that is none"),
        (json.dumps(WHOLE | {"counts": [[1, 2, 1e3], [4, 5]]}), "a count that is none"),
        (json.dumps(WHOLE | {"counts": [[1, 2, True], [4, 5]]}), "a count that is none"),
        (json.dumps(WHOLE | {"counts": [[1, 2, MAX_COUNT + 1], [4, 5]]}), "a count that is none"),
        (json.dumps(WHOLE | {"counts": None}), "2 layers"),
        ("\xff" * 9, "damaged"),
    ],
)
def test_a_damaged_file_is_ignored_with_one_warning(tmp_path: Path, text: str, says: str) -> None:
    warm = warm_start(tmp_path)
    warm.path.parent.mkdir()
    warm.path.write_bytes(text.encode("latin-1"))
    with logs_warning(says) as caught:
        assert warm.load() == {}
    assert len(caught) == 1 and caught[0].isprintable()
    warm.save(used(a0=1))
    assert warm.load() == {ExpertKey(0, 0): 1}


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    warm = warm_start(tmp_path)
    warm.path.parent.mkdir()
    with warm.path.open("wb") as file:
        file.truncate(1 << 40)
    with logs_warning("more than 16777216 bytes"):
        assert warm.load() == {}


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "usage").write_text("a file where the folder should be")
    warm = warm_start(tmp_path)
    with logs_warning("--no-warm-start") as caught:
        warm.save(used(a0=1))
    assert len(caught) == 1 and str(warm.path) in caught[0]


def test_what_was_there_stays_whole_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = warm_start(tmp_path)
    warm.save(used(a0=1))

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with logs_warning("No space left"):
        warm.save(used(a0=9))
    assert warm.load() == {ExpertKey(0, 0): 1}
    assert [path.name for path in warm.path.parent.iterdir()] == [warm.path.name]


@pytest.mark.parametrize(
    ("value", "expected"), [("/somewhere", "/somewhere/offmoe"), ("", "/me/.cache/offmoe"), ("x", "/me/.cache/offmoe")]
)
def test_the_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, value: str, expected: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/me")
    assert cache_folder() == Path(expected)


def test_an_engine_leaves_counts_and_the_next_one_takes_them_up() -> None:
    for run in (1, 2):
        with offmoe.load(expert_slots=60, policy="lfru") as engine:
            warm = engine._parts.serving.warm
            assert warm is not None
            found = warm.load()
            assert engine._parts.cache.policy.usage.counts == found
            assert bool(found) == (run == 2)
            engine.generate("import", max_new_tokens=5)
    assert sum(warm.load().values()) > sum(found.values())


def test_no_warm_start_leaves_nothing() -> None:
    with offmoe.load(expert_slots=60, warm_start=False) as engine:
        engine.generate("import", max_new_tokens=2)
    assert not cache_folder().exists()


def test_an_unwritable_cache_folder_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "offmoe").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with logs_warning("counts of earlier runs") as caught, offmoe.load(expert_slots=60) as engine:
        assert engine.generate("import", max_new_tokens=2).token_ids
    assert len(caught) == 1
