"""Rows by the CPU kernels as the executor has them computed: the same whichever way they come together."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from executor_cases import Call, make_math
from makers import NUM_EXPERTS, TOP_K, TinyExperts, open_cache

from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.loader import load_cpu_kernels, usable_levels
from offmoe.moe.cpu_backend import CpuBackend
from offmoe.moe.executor import Executor
from offmoe.moe.uncached import UncachedExecutor

pytestmark = pytest.mark.skipif(not usable_levels(), reason="the CPU kernels were not built")


@pytest.fixture
def kernels() -> Iterator[CpuKernels]:
    found, _ = load_cpu_kernels(threads=2)
    assert found is not None
    yield found
    found.close()


@pytest.mark.parametrize("num_slots", [2, 16])
@pytest.mark.parametrize("num_tokens", [1, 3, 64, 200])
def test_cached_is_uncached_to_the_bit(tiny: TinyExperts, kernels: CpuKernels, num_tokens: int, num_slots: int) -> None:
    """Whether all experts are there, come one by one, or are read for the call. Some have more rows than the kernels
    take."""
    math = make_math()
    with open_cache(tiny, num_slots=num_slots) as opened:
        rows = CpuBackend(kernels)
        executor = Executor(opened.cache, rows=rows)
        uncached = UncachedExecutor(opened.experts, opened.index.files, CpuBackend(kernels))
        for seed in range(4):
            call = Call(seed % 2, num_tokens, seed)
            once, again = call.run(executor, math), call.run(executor, math)
            assert torch.equal(once, again)
            assert torch.equal(once, call.run(uncached, math))
            torch.testing.assert_close(once, call.eager(tiny), rtol=1e-5, atol=1e-5)
        assert not rows.reasons


def test_a_token_whose_experts_are_there_counts_as_any_other(tiny: TinyExperts, kernels: CpuKernels) -> None:
    """The short way keeps the books of the long one: hits, recency, and no holds."""
    counters, recency = [], []
    for rows in (CpuBackend(kernels), None):
        with open_cache(tiny, num_slots=16) as opened:
            executor = Executor(opened.cache, rows=rows)
            for seed in range(12):
                Call(seed % 2, 1, seed).run(executor)
            totals = opened.cache.counters
            counters.append((totals.hits, totals.misses, totals.layer_calls))
            recency.append([opened.cache.policy.victim(lambda key, order=order: key not in order) for order in [[]]])
            opened.assert_at_rest()
    assert counters[0] == counters[1]
    assert recency[0] == recency[1]


def test_padding_and_an_expert_chosen_twice(tiny: TinyExperts, kernels: CpuKernels) -> None:
    with open_cache(tiny, num_slots=16) as opened:
        executor = Executor(opened.cache, rows=CpuBackend(kernels))
        for ids in ([3, 3], [2, NUM_EXPERTS], [5, 1]):
            assert len(ids) == TOP_K
            call = Call(0, 1).choosing(ids)
            for _ in range(2):
                torch.testing.assert_close(call.run(executor), call.eager(tiny), rtol=1e-5, atol=1e-5)


def test_what_the_kernels_do_not_know_is_computed_by_torch(tiny: TinyExperts, kernels: CpuKernels) -> None:
    math = make_math(biased=True)  # with a norm after the experts
    with open_cache(tiny, num_slots=16) as opened:
        rows = CpuBackend(kernels)
        executor = Executor(opened.cache, rows=rows)
        for num_tokens in (1, 1, 5):
            call = Call(0, num_tokens)
            torch.testing.assert_close(call.run(executor, math), call.eager(tiny, math), rtol=1e-5, atol=1e-5)
        assert "normed" in rows.reasons[0]
