"""Guesses are judged by how often such guesses came true, and only those worth their bytes are fetched."""

from __future__ import annotations

import random

import pytest
from prefetch_fakes import EXPERT_BYTES, FakeCache, check_ledger, fates
from virtual_machine import Speeds, VirtualMachine

from offmoe.core.keys import ExpertKey
from offmoe.online.ab_test import ABTest
from offmoe.prefetch.confidence import COMMON_TRIES, HALVE_AFTER, PRIOR_CHANCE, PrefetchConfidence, is_worth
from offmoe.prefetch.controller import PrefetchController


def learn(
    chances: PrefetchConfidence, layer_idx: int, distance: int, rank: int, share: float, tries: int, seed: int = 0
) -> None:
    rng = random.Random(seed)
    for _ in range(tries):
        chances.guessed(layer_idx, distance, [(rank, 7)])
        chances.spoke(layer_idx, {7} if rng.random() < share else {8})


def test_nothing_is_known_at_first() -> None:
    assert PrefetchConfidence().chance(0, 1, 0) == PRIOR_CHANCE and PrefetchConfidence().as_dict() == {}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_chances_are_those_seen_by_layer_distance_and_rank(share: float) -> None:
    chances = PrefetchConfidence()
    learn(chances, 0, 1, 2, share, 500)
    learn(chances, 0, 2, 2, 1 - share, 500)
    assert chances.chance(0, 1, 2) == pytest.approx(share, abs=0.1)
    assert chances.chance(0, 2, 2) == pytest.approx(1 - share, abs=0.1)
    assert chances.chance(0, 1, 3) == PRIOR_CHANCE  # another rank
    assert chances.as_dict()["1"][2] == pytest.approx(share, abs=0.1)


def test_a_layer_without_experience_is_taken_to_be_like_the_others_until_it_has_its_own() -> None:
    chances = PrefetchConfidence()
    learn(chances, 0, 1, 0, 1.0, 400)
    assert chances.chance(1, 1, 0) > 0.95
    learn(chances, 1, 1, 0, 0.0, int(COMMON_TRIES))
    assert 0.4 < chances.chance(1, 1, 0) < 0.6
    learn(chances, 1, 1, 0, 0.0, 200)
    assert chances.chance(1, 1, 0) < 0.1 and chances.chance(0, 1, 0) > 0.9


def test_what_is_long_ago_is_forgotten() -> None:
    chances = PrefetchConfidence()
    learn(chances, 0, 1, 0, 1.0, 2000)
    learn(chances, 0, 1, 0, 0.0, 4 * int(HALVE_AFTER))
    assert chances.chance(0, 1, 0) < 0.1


def test_a_guess_of_a_call_that_was_broken_off_teaches_nothing() -> None:
    chances = PrefetchConfidence()
    chances.guessed(0, 1, [(0, 7)])
    chances.forget_open()
    chances.spoke(0, {7})
    assert chances.chance(0, 1, 0) == PRIOR_CHANCE


@pytest.mark.parametrize(
    ("chance", "price", "worth"), [(0.5, 0.9, True), (0.5, 1.1, False), (0.1, 0.1, True), (0, 0, False)]
)
def test_a_fetch_is_worth_it_when_what_it_saves_is_more_than_what_it_costs(
    chance: float, price: float, worth: bool
) -> None:
    assert is_worth(chance, price) is worth


def make(*, busy: float = 0.0, far_when_idle: bool = True) -> tuple[FakeCache, PrefetchController]:
    machine = VirtualMachine(Speeds(link=EXPERT_BYTES), chunk_bytes=EXPERT_BYTES / 4)
    cache = FakeCache(machine, num_slots=12, num_layers=4)
    trial = ABTest((3, 0), first_after=10**9)
    prefetcher = PrefetchController(
        cache, budget_bytes=4 * EXPERT_BYTES, furthest=3, trial=trial, far_when_idle=far_when_idle
    )
    prefetcher.busy = busy
    return cache, prefetcher


def started(cache: FakeCache) -> list[tuple[int, int]]:
    return [(key.layer_idx, key.expert_idx) for what, key in cache.log if what == "ahead"]


def teach(prefetcher: PrefetchController, layer_idx: int, distance: int, shares: list[float]) -> None:
    assert prefetcher.chances is not None
    for rank, share in enumerate(shares):
        learn(prefetcher.chances, layer_idx, distance, rank, share, 300)


def test_only_what_is_worth_it_is_fetched_and_it_may_lie_beyond_the_routers_choice() -> None:
    cache, prefetcher = make()
    teach(prefetcher, 1, 1, [0.9, 0.02, 0.8, 0.02])
    prefetcher.request(1, [5, 4, 3, 2], distance=1, num_sure=2)
    prefetcher.pump()
    assert started(cache) == [(1, 5), (1, 3)]
    assert set(prefetcher.wanted) == {ExpertKey(1, 5), ExpertKey(1, 4), ExpertKey(1, 3)}  # kept, where it is cached
    check_ledger(prefetcher, 4 * EXPERT_BYTES)


def test_where_the_model_waits_most_of_the_time_only_sure_guesses_are_fetched() -> None:
    for busy, expected in ((0.0, [(1, 0), (1, 1)]), (1.0, [(1, 0)])):
        cache, prefetcher = make(busy=busy)
        teach(prefetcher, 1, 1, [0.8, 0.4])
        prefetcher.request(1, [0, 1], distance=1, num_sure=2)
        prefetcher.pump()
        assert started(cache) == expected, f"{busy=}"


def test_several_tokens_guesses_are_not_judged() -> None:
    cache, prefetcher = make()
    teach(prefetcher, 1, 1, [0.0, 0.0])
    prefetcher.request(1, [0, 1], distance=1)
    prefetcher.pump()
    assert started(cache) == [(1, 0), (1, 1)]


def test_far_guesses_start_one_at_a_time_and_only_when_the_drive_is_idle() -> None:
    cache, prefetcher = make()
    prefetcher.router_spoke(0, [0])
    prefetcher.request(1, [0], distance=1, num_sure=1)
    prefetcher.request(2, [0, 1], distance=2, num_sure=2)
    prefetcher.pump()
    assert started(cache) == [(1, 0)]
    for expected in ([(1, 0), (2, 0)], [(1, 0), (2, 0), (2, 1)]):
        cache.machine.drain()
        prefetcher.pump()
        assert started(cache) == expected


def test_far_layers_are_not_guessed_while_something_nearer_is_queued() -> None:
    cache, prefetcher = make()
    prefetcher.demand_begins()
    prefetcher.request(1, [0], distance=1, num_sure=1)
    assert [prefetcher.is_on(distance) for distance in (1, 2, 3)] == [True, False, False]
    prefetcher.demand_ends()
    prefetcher.pump()
    assert started(cache) == [(1, 0)] and prefetcher.is_on(2)


def test_a_better_guess_takes_back_what_an_earlier_one_had_queued() -> None:
    cache, prefetcher = make(far_when_idle=False)
    prefetcher.request(2, [0, 1], distance=2, num_sure=2)
    prefetcher.pump()
    prefetcher.request(2, [0, 3], distance=1, num_sure=2)  # (2, 1) has not begun
    prefetcher.pump()
    assert [key for what, key in cache.log if what == "cancel"] == [ExpertKey(2, 1)]
    assert fates(prefetcher) == (0, 1) and started(cache)[-1] == (2, 3)


def test_the_ledger_has_what_was_right_and_what_was_wrong() -> None:
    cache, prefetcher = make(far_when_idle=False)
    prefetcher.request(1, [0], distance=1, num_sure=1)
    prefetcher.request(2, [1], distance=2, num_sure=1)
    prefetcher.pump()
    cache.machine.drain()
    cache.poll()
    prefetcher.router_spoke(1, [0])
    cache.use(ExpertKey(1, 0))
    prefetcher.router_spoke(2, [5])
    assert fates(prefetcher) == (1, 1) and cache.counters.ahead_bytes == 2 * EXPERT_BYTES
    check_ledger(prefetcher, 4 * EXPERT_BYTES)
