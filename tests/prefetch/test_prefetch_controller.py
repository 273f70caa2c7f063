"""The prefetcher over a cache in virtual time: order, budget, cancellation, and what is never done."""

from __future__ import annotations

import json

import pytest
from prefetch_fakes import EXPERT_BYTES, FakeCache, check_ledger, fates
from prefetch_world import Shape, World
from virtual_machine import Speeds, VirtualMachine

from offmoe.core.keys import ExpertKey
from offmoe.prefetch.controller import PrefetchController, PrefetchMode

EXPERT_S = 1e-3  # one expert over the link


def make(
    *, num_slots: int = 8, num_layers: int = 4, budget: float = 100, mode: PrefetchMode = 2
) -> tuple[FakeCache, PrefetchController]:
    machine = VirtualMachine(Speeds(link=EXPERT_BYTES / EXPERT_S), chunk_bytes=EXPERT_BYTES / 4)
    cache = FakeCache(machine, num_slots=num_slots, num_layers=num_layers)
    prefetcher = PrefetchController(cache, budget_bytes=int(budget * EXPERT_BYTES), mode=mode)
    return cache, prefetcher


def load(cache: FakeCache, *keys: tuple[int, int]) -> None:
    """READY, not held."""
    for key in keys:
        coming = cache.demand(ExpertKey(*key))
        assert coming is not None
        cache.finish(coming)
        cache.release([ExpertKey(*key)])
    cache.log.clear()


def started(cache: FakeCache) -> list[tuple[int, int]]:
    return [(key.layer_idx, key.expert_idx) for what, key in cache.log if what == "ahead"]


def evicted(cache: FakeCache) -> list[tuple[int, int]]:
    return [(key.layer_idx, key.expert_idx) for what, key in cache.log if what == "evict"]


def test_the_nearest_layer_goes_first_and_the_surest_expert() -> None:
    cache, prefetcher = make()
    prefetcher.request(2, [5, 1], distance=2)
    prefetcher.request(1, [7, 3], distance=1)
    prefetcher.pump()
    assert started(cache) == [(1, 7), (1, 3), (2, 5), (2, 1)]


def test_a_layer_two_ahead_is_one_ahead_after_the_next_has_spoken() -> None:
    cache, prefetcher = make(budget=1)
    prefetcher.request(3, [0], distance=2)
    prefetcher.router_spoke(1, [0])
    prefetcher.request(4, [0], distance=2)
    prefetcher.request(3, [1], distance=1)  # replaces
    cache.machine.advance(1)
    prefetcher.pump()
    assert started(cache) == [(3, 1)]


def test_the_budget_bounds_what_is_under_way_not_what_was_moved() -> None:
    cache, prefetcher = make(budget=2.5)
    prefetcher.request(1, [0, 1, 2, 3, 4], distance=1)
    prefetcher.pump()
    assert started(cache) == [(1, 0), (1, 1)]
    cache.machine.advance(EXPERT_S)
    prefetcher.pump()
    assert started(cache) == [(1, 0), (1, 1), (1, 2)]
    cache.machine.drain()
    prefetcher.pump()
    cache.machine.drain()
    prefetcher.pump()
    assert len(started(cache)) == 5
    assert cache.most_ahead_bytes == 2 * EXPERT_BYTES


def test_nothing_starts_while_a_computation_waits() -> None:
    cache, prefetcher = make()
    prefetcher.request(1, [0], distance=1)
    prefetcher.demand_begins()
    prefetcher.pump()
    assert started(cache) == []
    prefetcher.demand_ends(1000)
    prefetcher.pump()
    assert started(cache) == [(1, 0)]


def test_a_layer_whose_fetches_failed_waits_no_longer_when_the_next_one_runs() -> None:
    cache, prefetcher = make()
    prefetcher.router_spoke(0, [0])
    prefetcher.demand_begins()
    prefetcher.router_spoke(1, [0])
    prefetcher.request(2, [0], distance=1)
    prefetcher.pump()
    assert started(cache) == [(2, 0)]


def test_what_is_ready_or_coming_is_not_asked_for_again() -> None:
    cache, prefetcher = make()
    load(cache, (1, 0))
    cache.demand(ExpertKey(1, 1))
    cache.log.clear()
    prefetcher.request(1, [0, 1, 2, 2], distance=1)
    prefetcher.pump()
    prefetcher.request(1, [2, 1, 0], distance=1)
    prefetcher.pump()
    assert started(cache) == [(1, 2)]


def test_a_wanted_key_that_was_evicted_before_its_turn_is_fetched() -> None:
    cache, prefetcher = make(num_slots=2)
    load(cache, (1, 0), (0, 0))
    prefetcher.request(1, [0], distance=1)
    load(cache, (0, 1))  # in the place of (1, 0)
    prefetcher.pump()
    assert started(cache) == [(1, 0)]


def test_a_new_prediction_replaces_the_old_and_takes_back_what_has_not_begun() -> None:
    cache, prefetcher = make()
    prefetcher.request(1, [0, 1, 2], distance=1)
    prefetcher.pump()  # 0 is on the link, 1 and 2 stand in line
    prefetcher.request(1, [2, 4], distance=1)
    prefetcher.pump()
    assert [(what, key.expert_idx) for what, key in cache.log] == [
        ("ahead", 0), ("ahead", 1), ("ahead", 2), ("cancel", 0), ("cancel", 1), ("ahead", 4)
    ]  # fmt: skip
    assert fates(prefetcher) == (0, 2)


def test_a_router_that_spoke_ends_the_prediction() -> None:
    cache, prefetcher = make(budget=2)
    prefetcher.request(1, [0, 1, 2], distance=1)
    prefetcher.pump()
    prefetcher.router_spoke(1, [1, 2])
    cache.machine.drain()
    prefetcher.pump()
    assert started(cache) == [(1, 0), (1, 1)]
    assert fates(prefetcher) == (0, 1) and not prefetcher.wanted


def test_a_late_prefetch_is_waited_for_and_not_moved_twice() -> None:
    cache, prefetcher = make()
    prefetcher.request(1, [0], distance=1)
    prefetcher.pump()
    cache.machine.advance(EXPERT_S / 4)
    prefetcher.router_spoke(1, [0])
    coming = cache.demand(ExpertKey(1, 0))
    assert coming is not None
    cache.finish(coming)
    assert cache.machine.link.carried_bytes == EXPERT_BYTES
    assert fates(prefetcher) == (1, 0) and cache.late == 1


def test_what_a_coming_layer_wants_is_not_evicted_for_another() -> None:
    cache, prefetcher = make(num_slots=3)
    load(cache, (2, 0), (0, 0), (0, 1))  # (2, 0) is the oldest
    prefetcher.request(2, [0], distance=2)
    prefetcher.request(1, [0, 1, 2], distance=1)
    prefetcher.pump()
    assert evicted(cache) == [(0, 0), (0, 1)] and started(cache) == [(1, 0), (1, 1)]
    prefetcher.router_spoke(1, [0, 1])
    assert set(prefetcher.wanted) == {ExpertKey(2, 0)}


def test_held_keys_stay() -> None:
    cache, prefetcher = make(num_slots=2)
    load(cache, (0, 0), (0, 1))
    prefetcher.router_spoke(0, [0, 1])
    cache.use(ExpertKey(0, 0))
    cache.use(ExpertKey(0, 1))
    prefetcher.request(1, [0], distance=1)
    prefetcher.pump()
    assert started(cache) == []
    cache.release([ExpertKey(0, 0)])
    prefetcher.pump()
    assert evicted(cache) == [(0, 0)]


def test_a_prediction_whose_layer_never_ran_is_forgotten() -> None:
    cache, prefetcher = make(budget=0)
    prefetcher.request(1, [0], distance=1)
    for _ in range(3):
        prefetcher.router_spoke(0, [0])
        assert set(prefetcher.wanted) == {ExpertKey(1, 0)}
    prefetcher.router_spoke(0, [0])
    assert not prefetcher.wanted
    prefetcher.pump()
    assert started(cache) == []


def test_a_budget_below_one_expert_prefetches_nothing() -> None:
    cache, prefetcher = make(budget=0.5)
    prefetcher.request(1, [0], distance=1)
    prefetcher.pump()
    assert started(cache) == []


@pytest.mark.parametrize(("mode", "on"), [("off", []), (1, [1]), (2, [1, 2]), (0, [])])
def test_a_fixed_distance(mode: PrefetchMode, on: list[int]) -> None:
    cache, prefetcher = make(mode=mode)
    assert [distance for distance in (1, 2, 3) if prefetcher.is_on(distance)] == on
    for distance in (1, 2, 3):
        prefetcher.request(distance, [0], distance=distance)
    prefetcher.pump()
    assert [layer for layer, _ in started(cache)] == on


def test_reset_forgets_and_counts_what_was_pending_as_wasted() -> None:
    cache, prefetcher = make(budget=2)
    prefetcher.request(1, [0, 1, 2], distance=1)
    prefetcher.pump()
    prefetcher.demand_begins()
    cache.recover()
    prefetcher.reset()
    assert fates(prefetcher) == (0, 2) and not prefetcher.wanted
    check_ledger(prefetcher, 2 * EXPERT_BYTES)
    prefetcher.request(1, [5], distance=1)  # no demand is waiting either
    prefetcher.pump()
    assert started(cache)[2:] == [(1, 5)]


def test_a_prefill_goes_through_free_slots_and_one_layers_share() -> None:
    cache, prefetcher = make(num_slots=12, num_layers=4)  # a share of 3
    decode = [(layer, expert) for layer in range(2) for expert in range(5)]
    load(cache, *decode)  # two slots are free
    prefetcher.request(2, range(8), distance=1, whole_layer=True)
    prefetcher.pump()
    assert started(cache) == [(2, 0), (2, 1), (2, 2)]
    assert evicted(cache) == [(0, 0)]


def test_a_prefill_finds_the_next_layer_on_its_way() -> None:
    world = World(Shape(num_slots=16, num_layers=4, num_experts=16))
    prefetcher = PrefetchController(world.cache, budget_bytes=4 * EXPERT_BYTES, mode=1)
    for layer_idx in range(4):
        if layer_idx + 1 < 4:
            prefetcher.request(layer_idx + 1, range(16), distance=1, whole_layer=True)
        world.run_layer(prefetcher, layer_idx, list(range(16)), cold=True)
        world.machine.advance(1e-3)
    useful, wasted = fates(prefetcher)
    assert useful >= 9 and not wasted
    moved = [key for what, key in world.cache.log if what in {"ahead", "demand"}]
    assert len(moved) == len(set(moved)) == 64, "every expert is moved once"


def test_as_dict_and_repr() -> None:
    _, prefetcher = make(budget=1)
    prefetcher.request(1, [0, 1], distance=1)
    prefetcher.pump()
    assert repr(prefetcher) == ("<PrefetchController 2 [distance 2 | 1 queued, 1 pending, 1000000 bytes under way]>")
    assert json.loads(json.dumps(prefetcher.as_dict())) == {
        "mode": 2, "distance": 2, "busy": 0.0,
        "ahead_bytes": EXPERT_BYTES, "ahead_used_bytes": 0, "ahead_wasted_bytes": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("mode", "allowed"), [("off", False), (0, False), (1, True), ("auto", True)])
def test_whole_layers_are_the_users_word(mode: PrefetchMode, allowed: bool) -> None:
    cache, prefetcher = make(mode=mode)
    prefetcher.request(1, [0], distance=1, whole_layer=True)
    prefetcher.pump()
    assert bool(started(cache)) is allowed


def test_a_prefill_is_no_observation() -> None:
    _, prefetcher = make(mode="auto")
    prefetcher.pass_ended(100.0, num_tokens=512)
    assert prefetcher.trial is not None and prefetcher.trial.total_s == 0


def test_busy_is_the_share_of_passes_that_stood_still() -> None:
    _, prefetcher = make()
    for _ in range(200):
        prefetcher.demand_ends(250_000_000)
        prefetcher.pass_ended(1.0)
    assert prefetcher.busy == pytest.approx(0.25, abs=0.01)
