"""A replay of a run's trace counts what the run counted, at every size and with every policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import PROMPT, TINY_EXPERTS, open_tiny, save_tiny
from hypothesis import given
from hypothesis import strategies as st
from test_replay import SIZES, calls_of

from offmoe.cache.policy import POLICY_NAMES
from offmoe.cache.replay import ReplayedCall, layer_calls, replay_belady, replay_calls
from offmoe.engine.engine import Engine
from offmoe.trace.reader import read_trace


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def go_through(engine: Engine) -> None:
    """Two prompts in pieces, with tokens between them that a seed chose."""
    engine.generate(PROMPT, max_new_tokens=14, temperature=2.0, seed=3)
    engine.generate(PROMPT[::-1], max_new_tokens=9, temperature=2.0, seed=4)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("num_slots", [2, 3, 4, 5, 9, TINY_EXPERTS])
def test_the_engine_counts_what_its_replay_counts(
    tiny: Path, tmp_path: Path, policy: str, num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tokens on which the fused step is compared are computed twice; the trace has them once.
    monkeypatch.setenv("OFFMOE_DECODE", "eager")
    options = {"expert_slots": num_slots, "policy": policy, "prefetch": "off", "prefill_chunk": 4}
    with open_tiny(tiny, **options) as engine, engine.trace(tmp_path / "a", guesses=False):
        go_through(engine)
        stats = engine.stats()
        bytes_of_one = engine._parts.experts.layers[0].expert_bytes
    trace = read_trace(tmp_path / "a")
    result = replay_calls(
        layer_calls(trace.events), policy, num_slots, top_k=trace.header.top_k, expert_bytes=trace.header.expert_bytes
    )
    assert (result.prefill.hits + result.decode.hits, result.prefill.misses + result.decode.misses) == (
        stats["hits"], stats["misses"],
    )  # fmt: skip
    assert result.decode.hit_rate == pytest.approx(stats["decode_hit_rate"], abs=1e-4)
    assert result.prefill.waiting_calls + result.decode.waiting_calls == stats["waiting_calls"]
    assert result.prefill.misses and result.decode.lookups
    assert result.decode.missed_bytes == result.decode.misses * bytes_of_one


_ids = st.sets(st.integers(0, 3), min_size=1, max_size=2).map(sorted)


@given(st.lists(st.tuples(_ids, _ids), min_size=1, max_size=12).map(calls_of), st.integers(2, 8))
def test_no_policy_beats_belady(calls: list[ReplayedCall], num_slots: int) -> None:
    least = replay_belady(calls, num_slots, SIZES)
    for name in POLICY_NAMES:
        found = replay_calls(calls, name, num_slots, top_k=2, expert_bytes=SIZES)
        assert found.prefill.misses + found.decode.misses >= least.prefill.misses + least.decode.misses
        assert found.decode.lookups == least.decode.lookups
