"""Replays against what they stand for: a plain LRU, all ways to choose, and each other."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmoe.cache.replay import ReplayedCall, ReplayResult, layer_calls, lru_curve, replay_belady
from offmoe.trace.recorder import PADDING, TraceEvent

NUM_LAYERS, NUM_EXPERTS = 2, 4
EXPERTS, SIZES = (NUM_EXPERTS,) * NUM_LAYERS, (10, 7)


def replay_static(calls: Sequence[ReplayedCall], num_slots: int, expert_bytes: Sequence[int]) -> ReplayResult:
    """The experts that the whole trace uses most, each fetched once and never let go: no policy can know them."""
    uses = Counter((call.layer_idx, idx) for call in calls for idx in call.rows_by_expert)
    kept = {key for key, _ in sorted(uses.items(), key=lambda item: (-item[1], item[0]))[:num_slots]}
    result = ReplayResult(name="static", num_slots=num_slots)
    here: set[tuple[int, int]] = set()
    for call in calls:
        needed = {(call.layer_idx, idx) for idx in call.rows_by_expert}
        hits = len(needed & here)
        result.phase(call).add(hits, len(needed) - hits, expert_bytes[call.layer_idx])
        here |= needed & kept
    return result


def calls_of(passes: Sequence[Sequence[Sequence[int]]]) -> list[ReplayedCall]:
    """One set of experts a layer, layer by layer; a pass with more than one row is a prompt's."""
    return layer_calls(
        TraceEvent(layer_idx, len(ids), idx % 3 == 0, array("H", ids))
        for idx, layers in enumerate(passes)
        for layer_idx, ids in enumerate(layers)
    )


_ids = st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=3).map(sorted)
_calls = st.lists(st.tuples(_ids, _ids), min_size=1, max_size=12).map(calls_of)
_few_calls = st.lists(st.tuples(_ids, _ids), min_size=1, max_size=4).map(calls_of)


def plain_lru(calls: list[ReplayedCall], num_slots: int) -> list[tuple[int, int]]:
    """(hits, misses) a call: all are looked up, then all become the most recent, then the oldest go."""
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    found = []
    for call in calls:
        keys = [(call.layer_idx, idx) for idx in call.rows_by_expert]
        hits = sum(key in cache for key in keys)
        found.append((hits, len(keys) - hits))
        for key in keys:
            cache[key] = None
            cache.move_to_end(key)
        while len(cache) > num_slots:
            cache.popitem(last=False)
    return found


def fewest_misses(calls: list[ReplayedCall], num_slots: int) -> int:
    """By trying every content of the cache after every call."""
    least: dict[frozenset[tuple[int, int]], int] = {frozenset(): 0}
    for call in calls:
        needed = frozenset((call.layer_idx, idx) for idx in call.rows_by_expert)
        after: dict[frozenset[tuple[int, int]], int] = {}
        for content, misses in least.items():
            cost = misses + len(needed - content)
            have = content | needed
            for size in range(min(num_slots, len(have)) + 1):
                for kept in combinations(sorted(have), size):
                    after[frozenset(kept)] = min(cost, after.get(frozenset(kept), cost))
        least = after
    return min(least.values())


def test_events_become_calls() -> None:
    events = [
        TraceEvent(0, 2, True, array("H", [3, 1, 1, PADDING])),
        TraceEvent(1, 2, True, array("H", [0, 1, 0, 1])),
        TraceEvent(0, 2, False, array("H", [2, 0])),
    ]
    calls = layer_calls(events)
    assert [list(call.rows_by_expert.items()) for call in calls] == [
        [(1, 2), (3, 1)],
        [(0, 2), (1, 2)],
        [(0, 1), (2, 1)],
    ]
    assert [call.starts_pass for call in calls] == [True, False, True]
    assert [call.is_prefill for call in calls] == [True, True, False]


@given(_calls)
def test_the_curve_is_lru_at_every_size(calls: list[ReplayedCall]) -> None:
    curve = lru_curve(calls, EXPERTS, SIZES)
    for num_slots in range(NUM_LAYERS * NUM_EXPERTS + 3):
        found = plain_lru(calls, num_slots)
        result = curve.at(num_slots)
        for is_prefill, tally in ((True, result.prefill), (False, result.decode)):
            counted = [(call, one) for call, one in zip(calls, found, strict=True) if call.is_prefill == is_prefill]
            assert tally.hits == sum(hits for _, (hits, _) in counted)
            assert tally.misses == sum(misses for _, (_, misses) in counted)
            assert tally.waiting_calls == sum(misses > 0 for _, (_, misses) in counted)
            assert tally.missed_bytes == sum(misses * SIZES[call.layer_idx] for call, (_, misses) in counted)


@given(_few_calls, st.integers(0, 5))
def test_belady_is_what_trying_everything_finds(calls: list[ReplayedCall], num_slots: int) -> None:
    result = replay_belady(calls, num_slots, SIZES)
    assert result.prefill.misses + result.decode.misses == fewest_misses(calls, num_slots)


@given(_calls, st.integers(0, 8), st.integers(0, 4))
def test_nothing_beats_belady(calls: list[ReplayedCall], num_slots: int, foresight: int) -> None:
    def misses(result: object) -> int:
        return result.prefill.misses + result.decode.misses  # type: ignore[attr-defined,no-any-return]

    best = misses(replay_belady(calls, num_slots, SIZES))
    assert best <= misses(lru_curve(calls, EXPERTS, SIZES).at(num_slots))
    assert best <= misses(replay_static(calls, num_slots, SIZES))
    assert best <= misses(replay_belady(calls, num_slots, SIZES, foresight=foresight))
    assert best == misses(replay_belady(calls, num_slots, SIZES, foresight=len(calls)))
    distinct = {(call.layer_idx, idx) for call in calls for idx in call.rows_by_expert}
    assert misses(replay_belady(calls, 8, SIZES)) == misses(replay_static(calls, 8, SIZES)) == len(distinct)


def test_foresight_sees_so_many_passes() -> None:
    """One layer of four, two slots. Expert 0 is needed again two passes later, 1 and 2 never."""
    calls = layer_calls(TraceEvent(0, 1, False, array("H", [idx])) for idx in (0, 1, 2, 0))
    assert replay_belady(calls, 1, [1]).decode.hits == 1
    assert replay_belady(calls, 1, [1], foresight=3).decode.hits == 1
    assert replay_belady(calls, 1, [1], foresight=1).decode.hits == 0


@pytest.mark.parametrize("num_slots", [0, 1, 2, 8])
def test_the_static_set_fetches_each_of_its_experts_once(num_slots: int) -> None:
    calls = calls_of([[[0, 1], [2, 3]]] * 5)
    result = replay_static(calls, num_slots, SIZES)
    kept = min(num_slots, 4)
    assert result.prefill.hits + result.decode.hits == 4 * kept
    assert result.prefill.misses + result.decode.misses == 20 - 4 * kept
    assert result.name == "static" and result.decode.hit_rate == result.decode.hits / result.decode.lookups
