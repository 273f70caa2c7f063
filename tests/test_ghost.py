"""A shadow cache does with keys what cache and executor do with weights, whatever the policy."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from executor_cases import Call
from makers import NUM_EXPERTS, NUM_LAYERS, TinyExperts, open_cache

from offmoe.base.keys import ExpertKey
from offmoe.cache.ghost import ShadowCache
from offmoe.cache.policy import POLICY_NAMES, make_policy
from offmoe.executor.executor import Executor

KEYS = [ExpertKey(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]


def random_calls(seed: int, num_calls: int) -> list[Call]:
    """Tokens one by one, with some prompts among them, through both layers in turn."""
    rng = random.Random(seed)
    return [Call(idx % NUM_LAYERS, rng.choice([1, 1, 1, 2, 9]), rng.randrange(1000)) for idx in range(num_calls)]


def rows_by_expert(call: Call) -> dict[int, int]:
    return dict(sorted(Counter(call.ids_TK.flatten().tolist()).items()))


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("num_slots", [2, 3, 5, 9, 14])
def test_same_hits_and_same_experts_as_the_cache(tiny: TinyExperts, name: str, num_slots: int) -> None:
    shadow = ShadowCache(make_policy(name), num_slots, NUM_LAYERS)
    with open_cache(tiny, num_slots=num_slots, policy=name) as opened:
        executor, counters = Executor(opened.cache), opened.cache.counters
        before = NUM_LAYERS
        for call in random_calls(num_slots, 120):
            earlier = counters.copy()
            call.run(executor)
            spent = counters.copy().minus(earlier)
            starts, before = call.layer_idx <= before, call.layer_idx
            result = shadow.call(call.layer_idx, rows_by_expert(call), starts_pass=starts)
            assert (len(result.hits), len(result.misses)) == (spent.hits, spent.misses)
            assert result.num_evictions == spent.evictions
            assert {key for key in KEYS if key in shadow} == opened.cached()
    assert counters.hits and counters.evictions
