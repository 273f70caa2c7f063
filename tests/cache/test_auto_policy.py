"""The race of policies, and the policy that follows its leader without moving an expert."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from executor_cases import Call
from makers import NUM_LAYERS, TinyExperts, open_cache

import offmoe
from offmoe.cache.auto import AutoPolicy, choose_policy, policy_facts
from offmoe.cache.policy import POLICY_NAMES, KeepAllPolicy, LruPolicy, make_policy, needs_quota
from offmoe.cache.race import BURST, GAP, WATCHED_FIRST, Race
from offmoe.cache.shadow import ShadowCache
from offmoe.core.keys import ExpertKey
from offmoe.moe.executor import Executor

LAYERS, EXPERTS, TOP_K, SLOTS = 4, 32, 4, 32
Routing = Callable[[random.Random, int], list[int]]


def hot_and_scan(rng: random.Random, token: int) -> list[int]:
    """Two of a few experts that are used again and again, and two that come round long after LRU forgot them."""
    return sorted({*rng.sample(range(4), 2), 4 + token * 2 % 28, 5 + token * 2 % 28})


def drifting(rng: random.Random, token: int) -> list[int]:
    """A few experts for some time, then others: what was used often says nothing."""
    return sorted(rng.sample(range(token // 60 * 5 % 24, token // 60 * 5 % 24 + 8), 4))


def tokens(routing: Routing, num_tokens: int, seed: int = 0) -> Iterator[tuple[int, list[int]]]:
    rng = random.Random(seed)
    for token in range(num_tokens):
        for layer_idx in range(LAYERS):
            yield layer_idx, routing(rng, token)


def make_auto(num_slots: int = SLOTS) -> AutoPolicy:
    policy = choose_policy("auto", num_slots, [EXPERTS] * LAYERS, [100] * LAYERS, TOP_K)
    assert isinstance(policy, AutoPolicy)
    return policy


def misses(policy: object, calls: Iterator[tuple[int, list[int]]], num_slots: int = SLOTS) -> int:
    """What a cache fetches; an auto policy is told of every call."""
    shadow, total = ShadowCache(policy, num_slots, LAYERS), 0  # type: ignore[arg-type]
    for layer_idx, ids in calls:
        if isinstance(policy, AutoPolicy):
            policy.layer_call(layer_idx, ids)
        total += len(shadow.call(layer_idx, dict.fromkeys(ids, 1), starts_pass=layer_idx == 0).misses)
    return total


def test_auto_comes_near_the_best_where_lru_is_not() -> None:
    fixed = {name: misses(make_policy(name), tokens(hot_and_scan, 2000)) for name in POLICY_NAMES}
    auto = make_auto()
    total = misses(auto, tokens(hot_and_scan, 2000))
    assert min(fixed.values()) < 0.85 * fixed["lru"]
    assert auto.name != "lru" and total < 1.06 * min(fixed.values())


def test_auto_is_not_worse_than_lru_where_lru_is_good() -> None:
    lru = misses(LruPolicy(), tokens(drifting, 3000))
    assert misses(make_auto(), tokens(drifting, 3000)) <= 1.01 * lru


def test_auto_follows_when_the_text_changes() -> None:
    def both(rng: random.Random, token: int) -> list[int]:
        return hot_and_scan(rng, token) if token < 1500 else drifting(rng, token)

    auto = make_auto()
    total = misses(auto, tokens(both, 6000))
    assert auto.race.num_switches >= 2 and auto.name == "lru"
    assert total <= 1.02 * misses(LruPolicy(), tokens(both, 6000))


def test_a_change_moves_no_expert(tiny: TinyExperts) -> None:
    auto = AutoPolicy(Race(5, [1] * NUM_LAYERS), make_policy)
    with open_cache(tiny, num_slots=5) as opened:
        opened.cache.policy = opened.cache.contents.policy = auto
        executor = Executor(opened.cache)
        for name in (*POLICY_NAMES, "lru"):
            Call(0, 1, 3).run(executor)
            Call(1, 1, 5).run(executor)
            before, evictions = opened.cached(), opened.cache.counters.evictions
            auto.race.choice = name
            opened.cache.begin_layer(0)
            assert auto.name == name and opened.cached() == before
            assert opened.cache.counters.evictions == evictions
            assert f"[{len(before)} keys]" in repr(auto)
            opened.assert_at_rest()


def test_a_listening_policy_tells_the_race_what_it_sees() -> None:
    auto = AutoPolicy(Race(8, [1] * LAYERS, quota=True), make_policy, listens=True)
    shadow = ShadowCache(auto, 8, LAYERS)
    for layer_idx, ids in tokens(hot_and_scan, 700):
        auto.layer_call(layer_idx, None)
        shadow.call(layer_idx, dict.fromkeys(ids, 1), starts_pass=layer_idx == 0)
    told = Race(8, [1] * LAYERS, quota=True)
    for layer_idx, ids in tokens(hot_and_scan, 700):
        if layer_idx == 0:
            told.token_pass()
        told.call(layer_idx, ids)
    assert any(told.total_bytes.values())
    assert auto.race.total_bytes == told.total_bytes


def test_only_some_layers_and_passes_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    race, watched = Race(100, [1] * 24), set[int]()
    call = ShadowCache.call

    def watch(shadow: ShadowCache, layer_idx: int, rows: dict[int, int], *, starts_pass: bool) -> object:
        watched.add(layer_idx)
        return call(shadow, layer_idx, rows, starts_pass=starts_pass)

    def run(num_passes: int) -> set[int]:
        watched.clear()
        for _ in range(num_passes):
            race.token_pass()
            for layer_idx in range(24):
                race.call(layer_idx, [1, 2])
        return set(watched)

    monkeypatch.setattr(ShadowCache, "call", watch)
    assert run(WATCHED_FIRST) == {0, 1, 2, 3, 4, 5, 6, 7}
    assert run(GAP - 1) == set()
    assert len(run(BURST)) == 8


def test_what_there_is_nothing_to_choose_for() -> None:
    policy = choose_policy("auto", LAYERS * EXPERTS, [EXPERTS] * LAYERS, [1] * LAYERS, TOP_K)
    assert isinstance(policy, KeepAllPolicy) and policy_facts(policy) == {"policy": "all"}


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_share_for_each_layer_where_a_token_needs_more_than_there_is(name: str) -> None:
    num_slots = LAYERS * TOP_K - 1
    assert needs_quota(num_slots, LAYERS, TOP_K)
    quota = choose_policy(name, num_slots, [EXPERTS] * LAYERS, [1] * LAYERS, TOP_K)
    rng = random.Random(1)
    calls = [
        (layer_idx, sorted({0, 1, *rng.sample(range(2, 12), 2)})) for _ in range(200) for layer_idx in range(LAYERS)
    ]
    pooled = misses(make_policy(name), iter(calls), num_slots)
    assert misses(quota, iter(calls), num_slots) < pooled


def test_one_pool_of_lru_finds_nothing_where_a_share_for_each_layer_does() -> None:
    num_slots, calls = 3 * LAYERS, [(layer_idx, [0, 1, 2, 3]) for _ in range(50) for layer_idx in range(LAYERS)]
    shares = make_policy("lru", num_slots=num_slots, num_layers=LAYERS, quota=True)
    assert misses(LruPolicy(), iter(calls), num_slots) == 4 * len(calls)
    assert misses(shares, iter(calls), num_slots) < 2 * len(calls)


def test_layers_take_from_themselves_beyond_their_share() -> None:
    policy = make_policy("lru", num_slots=5, num_layers=2, quota=True)  # three slots and two
    a, b, c, d = (ExpertKey(0, idx) for idx in range(4))
    for key in (a, b, c, d):
        policy.inserted(key, cold=False)
    policy.inserted(ExpertKey(1, 0), cold=False)
    assert policy.victim(lambda key: True, 1) == a  # layer 0 has one too many
    policy.removed(a)
    policy.inserted(ExpertKey(1, 1), cold=False)
    assert policy.victim(lambda key: True, 1) == ExpertKey(1, 0)
    assert policy.victim(lambda key: True, 0) == b
    assert policy.victim(lambda key: key.layer_idx == 0, 1) == b  # none of its own may go


def test_the_engine_says_which_policy_is_in_use() -> None:
    with offmoe.load(expert_slots=60, warm_start=False) as engine:
        engine.generate("import", max_new_tokens=20, ignore_eos=True)
        stats = engine.stats()
        assert stats["policy"] == "lru" and stats["policy_switches"] == 0
        assert set(stats["policy_sample_bytes"]) == {*POLICY_NAMES, "lfru/layer"}
        assert "lru" in repr(engine._parts.cache.policy).lower()
