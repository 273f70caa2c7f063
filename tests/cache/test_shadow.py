"""A shadow cache does with keys what cache and executor do with weights, whatever the policy."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from executor_cases import Call
from makers import NUM_EXPERTS, NUM_LAYERS, TinyExperts, open_cache

from offmoe.cache.policy import POLICY_NAMES, make_policy
from offmoe.cache.race import Race
from offmoe.cache.shadow import ShadowCache
from offmoe.core.keys import ExpertKey
from offmoe.moe.executor import Executor

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


class Interruption:
    """A trace function that raises KeyboardInterrupt at one line of the cache's own code."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._count if Path(frame.f_code.co_filename).parent.name == "cache" else None

    def _count(self, frame: FrameType, event: str, arg: object) -> Any:
        self.left -= event == "line"
        if self.left == 0:
            raise KeyboardInterrupt
        return self._count


def test_a_race_that_was_broken_off_between_any_two_lines_goes_on() -> None:
    """Before, policy and keys of a shadow cache differed after Ctrl-C, and a later token ended in a KeyError."""
    rng = random.Random(2)

    def call(race: Race) -> None:
        race.token_pass()
        for layer_idx in range(NUM_LAYERS):
            race.call(layer_idx, rng.sample(range(NUM_EXPERTS), 2))

    struck, line = 0, 1
    previous = sys.gettrace()
    race = Race(6, [100] * NUM_LAYERS)
    for _ in range(20):
        call(race)
    while True:
        interruption = Interruption(line)
        sys.settrace(interruption)
        try:
            call(race)
        except KeyboardInterrupt:
            struck += 1
        finally:
            sys.settrace(previous)
        if interruption.left > 0:
            break
        race.recover()
        for shadow in race._shadows.values():
            known = {key for keys in shadow.policy.drain() for key in keys}
            assert known == shadow._cached and len(known) <= 6
            for key in sorted(known):
                shadow.policy.restored(key, cold=False)
        for _ in range(3):
            call(race)
        line += 7
    assert struck > 40
