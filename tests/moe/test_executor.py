"""One MoE layer through the cache: equal to the plain formula, and the same bits whatever was cached or came first.

Shapes: T tokens, K experts a token, D model width, F expert width, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from executor_cases import BFLOAT16, BIASED, MATH, PADDING, Call, LateDisk, calls_of, gated, interleaved, make_math
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import NUM_EXPERTS, NUM_LAYERS, Opened, TinyExperts, make_tiny_experts, open_cache

from offmoe.kernels.reference import COMBINE_TOKENS, ExpertMath
from offmoe.moe.executor import Executor
from offmoe.moe.uncached import UncachedExecutor


@pytest.fixture
def opened(tiny: TinyExperts) -> Iterator[Opened]:
    with open_cache(tiny, num_slots=4) as made:
        yield made
        made.assert_at_rest()


@pytest.mark.parametrize("math", [MATH, BIASED], ids=["plain", "biases and norm"])
@pytest.mark.parametrize("num_tokens", [1, 2, 37, COMBINE_TOKENS + 3])
def test_equals_the_plain_formula(tiny_of_layout: TinyExperts, num_tokens: int, math: ExpertMath) -> None:
    with open_cache(tiny_of_layout, num_slots=4) as opened:
        for layer_idx in range(NUM_LAYERS):
            call = Call(layer_idx, num_tokens)
            torch.testing.assert_close(
                call.run(Executor(opened.cache), math), call.eager(tiny_of_layout, math), rtol=1e-5, atol=1e-5
            )
            opened.assert_at_rest()


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), num_slots=st.integers(1, 16), num_tokens=st.sampled_from([1, 2, 5, 30]))
def test_equals_the_plain_formula_with_padding_and_repeats(
    tiny: TinyExperts, seed: int, num_slots: int, num_tokens: int
) -> None:
    call = Call(seed % NUM_LAYERS, num_tokens, seed, top_k=3)
    call.ids_TK = torch.randint(-1, NUM_EXPERTS + 2, (num_tokens, 3), generator=torch.Generator().manual_seed(seed))
    with open_cache(tiny, num_slots=num_slots) as opened:
        torch.testing.assert_close(call.run(Executor(opened.cache)), call.eager(tiny), rtol=1e-5, atol=1e-5)
        opened.assert_at_rest()
        assert len(opened.disk.plans_read) == len(call.experts)


@pytest.mark.parametrize("ids", [[[3, 3]], [[3, 3], [3, 1]]], ids=["one token", "two tokens"])
def test_an_expert_chosen_twice_by_a_token_counts_twice(opened: Opened, ids: list[list[int]]) -> None:
    call = Call(0, len(ids)).choosing(*ids)
    torch.testing.assert_close(call.run(Executor(opened.cache)), call.eager(opened.tiny), rtol=1e-5, atol=1e-5)
    assert len(opened.disk.plans_read) == len(call.experts)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_padding_contributes_nothing_and_reads_nothing(opened: Opened, num_tokens: int) -> None:
    call = Call(0, num_tokens).choosing(*[[PADDING, PADDING + 5]] * num_tokens)
    assert call.run(Executor(opened.cache)).eq(0).all()
    assert opened.disk.plans_read == []


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_the_result_has_the_type_of_the_states(opened: Opened, num_tokens: int) -> None:
    call = Call(0, num_tokens)
    exact = call.eager(opened.tiny)
    call.x_TD = call.x_TD.bfloat16()
    got = call.run(Executor(opened.cache))
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.05)


# --- the same bits, whatever the cache did


@pytest.mark.parametrize("math", [MATH, BIASED, BFLOAT16], ids=["plain", "biases and norm", "bfloat16"])
def test_neither_slots_nor_reads_change_a_bit(tiny_of_layout: TinyExperts, math: ExpertMath) -> None:
    calls = calls_of(seed=1, count=12)
    with open_cache(tiny_of_layout, num_slots=1) as opened:
        uncached = UncachedExecutor(opened.experts, opened.index.files)
        expected = [call.run(uncached, math) for call in calls]
    for num_slots, io in itertools.product((1, 2, 3, 5, 16), ("auto", "buffered")):
        with open_cache(tiny_of_layout, num_slots=num_slots, io=io) as opened:
            executor = Executor(opened.cache)
            for call, y_TD in zip(calls, expected, strict=True):
                assert torch.equal(call.run(executor, math), y_TD)
                opened.assert_at_rest()


@pytest.mark.parametrize("width_F", [20, 33, 64])
@pytest.mark.parametrize("activate", [gated, interleaved])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_computed_together_or_alone_give_the_same_bits(
    tmp_path: Path, width_F: int, activate: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    """Widths that are no multiple of a vector, and an activation that torch vectorises over all rows at once."""
    tiny, math = make_tiny_experts(tmp_path, width_F=width_F), make_math(activate, width_F=width_F, dtype=dtype)
    calls = [Call(idx % NUM_LAYERS, 1, idx, top_k=4) for idx in range(12)]
    with open_cache(tiny, num_slots=5) as opened:
        uncached = UncachedExecutor(opened.experts, opened.index.files)
        for call in calls:
            assert torch.equal(call.run(Executor(opened.cache), math), call.run(uncached, math))


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), num_slots=st.integers(1, 9))
def test_the_order_of_arrival_changes_no_bit(tiny: TinyExperts, seed: int, num_slots: int) -> None:
    calls = calls_of(seed)
    with open_cache(tiny, num_slots=num_slots) as opened:
        expected = [call.run(Executor(opened.cache)) for call in calls]
    LateDisk.chance.seed(seed)
    with open_cache(tiny, num_slots=num_slots, disk_type=LateDisk) as opened:
        for call, y_TD in zip(calls, expected, strict=True):
            assert torch.equal(call.run(Executor(opened.cache)), y_TD)
            opened.assert_at_rest()
