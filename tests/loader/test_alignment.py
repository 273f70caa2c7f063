"""Where all experts fit, 16-bit ones are moved once to the start of a cache line; where not, nothing is moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build, save_layout

import offmoe
from offmoe.cache.backing_store import LINE_BYTES
from offmoe.core.keys import ExpertKey

IDS = list(range(3, 60))


def starts(engine: offmoe.Engine) -> set[int]:
    """Addresses modulo a cache line of the first matrix of every cached expert."""
    cache, experts = engine._parts.cache, engine._parts.experts
    found = set()
    for key in experts.keys():  # noqa: SIM118 - not a mapping
        if cache.is_ready(ExpertKey(*key)):
            weights = cache.use(key, touch=False)
            found.add(min(part.data_ptr() for part in (*weights.up, *weights.down)) % LINE_BYTES)
            cache.release([key])
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Mixtral in bfloat16, whose tensors do not begin on cache lines."""
    save_layout(build("mixtral", dtype=torch.bfloat16), tmp_path, "published")
    return tmp_path


def test_moved_where_all_fit_and_the_numbers_stay(checkpoint: Path) -> None:
    with offmoe.load(str(checkpoint), ram="4GiB", expert_slots=8, pack="off") as engine:
        expected = engine.generate(IDS, max_new_tokens=8, temperature=0, ignore_eos=True)
        assert starts(engine) != {0}
    with offmoe.load(str(checkpoint), ram="4GiB", pack="off") as engine:
        reply = engine.generate(IDS, max_new_tokens=8, temperature=0, ignore_eos=True)
        assert starts(engine) == {0}
        with engine.uncached():
            uncached = engine.generate(IDS, max_new_tokens=8, temperature=0, ignore_eos=True)
    assert reply.token_ids == expected.token_ids == uncached.token_ids
