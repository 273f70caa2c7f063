"""The prefetcher over the real cache and real files; and Ctrl-C at each of its lines."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from interrupts import Interrupt
from makers import NUM_EXPERTS, NUM_LAYERS, Opened, TinyExperts, failing_reads, open_cache
from prefetch_fakes import EXPERT_BYTES, check_ledger
from prefetch_world import Shape, World

import offmoe
from offmoe.core.errors import DiskReadError
from offmoe.core.keys import ExpertKey
from offmoe.formats.dense import ExpertWeights
from offmoe.prefetch.controller import PrefetchController, PrefetchMode

PACKAGE = Path(offmoe.__file__).parent
INTERRUPTED_FILES = {
    str(PACKAGE / name) for name in ("prefetch/controller.py", "prefetch/confidence.py", "online/ab_test.py")
}
A, B, C = (ExpertKey(0, expert) for expert in range(3))


def make(opened: Opened, *, mode: PrefetchMode = 2, budget: int = 4) -> PrefetchController:
    budget_bytes = budget * opened.cache.num_bytes(A)
    return PrefetchController(opened.cache, budget_bytes=budget_bytes, mode=mode)


def arrive(opened: Opened) -> None:
    """Wait until nothing is under way."""
    while opened.cache.ahead_bytes:
        opened.cache.poll()
        time.sleep(0.0005)


def get(opened: Opened, key: ExpertKey) -> ExpertWeights:
    """As the executor does."""
    if opened.cache.is_ready(key):
        return opened.cache.use(key, touch=True)
    fetch = opened.cache.start(key, cold=False)
    if fetch is None:
        opened.cache.settle()
        fetch = opened.cache.start(key, cold=False)
    assert fetch is not None
    return opened.cache.finish(fetch)


@pytest.mark.parametrize("num_slots", [3, 6, NUM_LAYERS * NUM_EXPERTS])
def test_whatever_is_predicted_the_weights_are_the_files(tiny: TinyExperts, num_slots: int) -> None:
    rng = random.Random(num_slots)
    with open_cache(tiny, num_slots=num_slots) as opened:
        prefetcher = make(opened)
        for call in range(60):
            layer_idx = call % NUM_LAYERS
            needed = rng.sample(range(NUM_EXPERTS), 2)
            opened.cache.poll()
            prefetcher.router_spoke(layer_idx, needed)
            keys = [ExpertKey(layer_idx, expert) for expert in needed]
            prefetcher.request((layer_idx + 1) % NUM_LAYERS, rng.sample(range(NUM_EXPERTS), 3), distance=1)
            for key in keys:
                weights = get(opened, key)
                gate, up, down = tiny.matrices(key)
                assert torch.equal(torch.cat(weights.up), torch.cat([gate, up]))
                assert torch.equal(torch.cat(weights.down, dim=1), down)
                prefetcher.pump()
            opened.cache.release(keys)
            check_ledger(prefetcher, 4 * opened.cache.num_bytes(A))
        assert 0 < opened.cache.counters.ahead_used_bytes < opened.cache.counters.ahead_bytes
        opened.cache.settle()
        opened.assert_at_rest()


def test_a_prefetched_expert_is_read_once(tiny: TinyExperts) -> None:
    with open_cache(tiny, num_slots=4) as opened:
        prefetcher = make(opened)
        prefetcher.request(0, [0, 1], distance=1)
        prefetcher.pump()
        prefetcher.router_spoke(0, [0, 1])
        get(opened, A)  # perhaps late
        arrive(opened)
        get(opened, B)
        assert len(opened.disk.plans_read) == 2
        assert opened.cache.counters.ahead_used_bytes == 2 * opened.cache.num_bytes(A)
        opened.cache.release([A, B])


def test_a_read_that_fails_ahead_of_time_is_told_on_demand(tiny: TinyExperts) -> None:
    with open_cache(tiny, num_slots=4) as opened:
        prefetcher = make(opened)
        with failing_reads(opened, B):
            prefetcher.request(0, [0, 1, 2], distance=1)
            prefetcher.pump()
            arrive(opened)
            prefetcher.pump()
            arrive(opened)
            with pytest.raises(DiskReadError):
                get(opened, B)
        assert opened.cached() == {A, C}
        get(opened, B)
        opened.cache.release([B])
        check_ledger(prefetcher, 4 * opened.cache.num_bytes(A))
        opened.assert_at_rest()


@pytest.mark.parametrize("mode", ["auto", 2])
def test_after_ctrl_c_anywhere_it_is_at_rest_and_goes_on(mode: PrefetchMode) -> None:
    """Lines 1, 1 + step, ... of a few passes, most of which compare."""
    shape = Shape(num_layers=3, num_experts=8, top_k=2, num_slots=7)
    number = 1
    while True:
        world = World(shape)
        prefetcher = PrefetchController(world.cache, budget_bytes=3 * EXPERT_BYTES, mode=mode)
        world.run(prefetcher, 5)
        try:
            with Interrupt(INTERRUPTED_FILES, number=number):
                world.run(prefetcher, 3)
        except KeyboardInterrupt:
            world.cache.recover()
            prefetcher.reset()
        else:
            break
        assert not prefetcher.wanted and not prefetcher.num_pending
        check_ledger(prefetcher, 3 * EXPERT_BYTES)
        world.run(prefetcher, 3)
        check_ledger(prefetcher, 3 * EXPERT_BYTES)
        number += 7
    assert number > 200
