"""One MoE layer through the cache: equal to the plain formula, and the same bits whatever was cached or came first.

Shapes: T tokens, K experts a token, D model width, F expert width, E experts.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import (
    NUM_EXPERTS,
    NUM_LAYERS,
    TOP_K,
    WIDTH_D,
    Opened,
    RecordingDisk,
    TinyExperts,
    failing_reads,
    make_tiny_experts,
    open_cache,
)

from offmoe.base.errors import DiskReadError
from offmoe.base.keys import ExpertKey
from offmoe.checkpoint.expert_index import ReadPlan
from offmoe.executor import executor as executor_module
from offmoe.executor.executor import Executor
from offmoe.executor.uncached import UncachedExecutor
from offmoe.kernels.reference import COMBINE_TOKENS, ExpertMath
from offmoe.tiers.copier import Ticket

if TYPE_CHECKING:
    from offmoe.models.seam import ExpertsExecutor

PADDING = NUM_EXPERTS


def gated(up_N2F: torch.Tensor) -> torch.Tensor:
    gate, up = up_N2F.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def interleaved(up_N2F: torch.Tensor) -> torch.Tensor:
    """As gpt-oss has it: gate and up alternate, and the sigmoid is of a fresh array of all rows."""
    gate, up = up_N2F[..., ::2], up_N2F[..., 1::2]
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def make_math(
    activate: Callable[[torch.Tensor], torch.Tensor] = gated,
    *,
    biased: bool = False,
    width_F: int = 64,
    dtype: torch.dtype = torch.float32,
) -> ExpertMath:
    generator = torch.Generator().manual_seed(3)
    return ExpertMath(
        activate=activate,
        up_bias_EF=torch.randn(NUM_EXPERTS, 2 * width_F, generator=generator).to(dtype) if biased else None,
        down_bias_ED=torch.randn(NUM_EXPERTS, WIDTH_D, generator=generator).to(dtype) if biased else None,
        post_norm=(lambda y_ND: y_ND / (1 + y_ND.abs().amax(-1, keepdim=True))) if biased else None,
        transposed=False,
        dtype=dtype,
    )


MATH, BIASED = make_math(), make_math(biased=True)
BFLOAT16 = make_math(biased=True, dtype=torch.bfloat16)


class Call:
    """What the model hands to one layer."""

    def __init__(self, layer_idx: int, num_tokens: int, seed: int = 0, *, top_k: int = TOP_K) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layer_idx = layer_idx
        self.x_TD = torch.randn(num_tokens, WIDTH_D, generator=generator)
        self.ids_TK = torch.randint(0, NUM_EXPERTS, (num_tokens, top_k), generator=generator)
        self.weights_TK = torch.rand(num_tokens, top_k, generator=generator)

    def choosing(self, *ids: list[int]) -> Call:
        """The same with given experts, a list for each token."""
        self.ids_TK = torch.tensor(ids)
        return self

    @property
    def experts(self) -> set[ExpertKey]:
        return {ExpertKey(self.layer_idx, idx) for idx in self.ids_TK.unique().tolist() if 0 <= idx < NUM_EXPERTS}

    def run(self, executor: ExpertsExecutor, math: ExpertMath = MATH) -> torch.Tensor:
        return executor.run_layer(self.layer_idx, math, NUM_EXPERTS, self.x_TD, self.ids_TK, self.weights_TK)

    def eager(self, tiny: TinyExperts, math: ExpertMath = MATH) -> torch.Tensor:
        """The formula, token by token, in float64."""
        y_TD = torch.zeros_like(self.x_TD, dtype=torch.float64)
        for token, (ids, weights) in enumerate(zip(self.ids_TK.tolist(), self.weights_TK.tolist(), strict=True)):
            for idx, weight in zip(ids, weights, strict=True):
                if 0 <= idx < NUM_EXPERTS:
                    y_TD[token] += weight * self._expert(tiny, math, idx, self.x_TD[token].double())
        return y_TD.float()

    def _expert(self, tiny: TinyExperts, math: ExpertMath, idx: int, x_D: torch.Tensor) -> torch.Tensor:
        gate, up, down = (matrix.double() for matrix in tiny.matrices(ExpertKey(self.layer_idx, idx)))
        up_2F = torch.cat([gate @ x_D, up @ x_D])
        up_2F += 0 if math.up_bias_EF is None else math.up_bias_EF[idx].double()
        y_D = down @ math.activate(up_2F[None])[0]
        y_D += 0 if math.down_bias_ED is None else math.down_bias_ED[idx].double()
        return y_D if math.post_norm is None else math.post_norm(y_D[None])[0]


def calls_of(seed: int, count: int = 6) -> list[Call]:
    """Decode and prefill, layer by layer, as a model runs."""
    order = random.Random(seed)
    return [Call(idx % NUM_LAYERS, order.choice([1, 1, 1, 2, 9, 40]), seed=seed + idx) for idx in range(count)]


@pytest.fixture
def opened(tiny: TinyExperts) -> Iterator[Opened]:
    with open_cache(tiny, num_slots=4) as made:
        yield made
        made.assert_at_rest()


# --- equal to the formula


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


class LateTicket:
    """A read that ends when chance has it, or when it is waited for."""

    def __init__(self, read: Callable[[], None], chance: random.Random) -> None:
        self._read, self._chance, self._ended = read, chance, False

    def done(self) -> bool:
        if not self._ended and self._chance.random() < 0.3:
            self.wait()
        return self._ended

    def wait(self) -> None:
        if not self._ended:
            self._read()
            self._ended = True


class LateDisk(RecordingDisk):
    """Reads arrive late and in another order each time; until then the slot holds NaN."""

    chance = random.Random(0)

    def read(self, plan: ReadPlan, slot: memoryview, *, urgent: bool = True) -> Ticket:
        slot[:] = b"\xff" * len(slot)
        return LateTicket(lambda: super(LateDisk, self).read(plan, slot).wait(), self.chance)


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


# --- what is read, and what is kept


@pytest.mark.parametrize("num_slots", [1, 3, 16])
@pytest.mark.parametrize("num_tokens", [1, 64])
def test_an_expert_is_read_at_most_once_in_a_call(tiny: TinyExperts, num_slots: int, num_tokens: int) -> None:
    with open_cache(tiny, num_slots=num_slots) as opened:
        for seed in range(4):
            call = Call(0, num_tokens, seed)
            before, cached = len(opened.disk.plans_read), opened.cached()
            call.run(Executor(opened.cache))
            read = opened.disk.plans_read[before:]
            assert len(set(read)) == len(read) == len(call.experts - cached)


def test_hits_and_misses_are_counted_by_expert(opened: Opened) -> None:
    executor, counters = Executor(opened.cache), opened.cache.counters
    Call(0, 1).choosing([1, 2]).run(executor)
    assert (counters.hits, counters.misses, counters.layer_calls) == (0, 2, 1)
    Call(0, 3).choosing([1, 2], [1, 1], [2, PADDING]).run(executor)
    assert (counters.hits, counters.misses, counters.layer_calls) == (2, 2, 2)
    Call(1, 1).choosing([1, 2]).run(executor)  # the same numbers in another layer are other experts
    assert (counters.hits, counters.misses) == (2, 4)


def test_decoding_keeps_what_it_used_last(opened: Opened) -> None:
    executor = Executor(opened.cache)
    for ids in ([0, 1], [2, 3], [0, 4]):
        Call(0, 1).choosing(ids).run(executor)
    assert opened.cached() == {ExpertKey(0, idx) for idx in (0, 2, 3, 4)} - {ExpertKey(0, 1)}


def test_a_long_prompt_keeps_its_busiest_experts_and_what_decoding_uses(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four slots, two layers: a prompt may keep two experts of a layer, the other six pass through one slot."""
    monkeypatch.setattr(executor_module, "MAX_READS_IN_FLIGHT", 1)
    executor = Executor(opened.cache)
    Call(1, 1).choosing([1, 0]).run(executor)
    Call(0, 9).choosing([6, 0], [6, 1], [6, 2], [6, 3], [6, 4], [3, 5], [3, 7], [3, 6], [3, 6]).run(executor)
    busiest = {ExpertKey(0, 3), ExpertKey(0, 6)}
    assert opened.cached() == busiest | {ExpertKey(1, 1), ExpertKey(0, 7)}
    Call(1, 1).choosing([2, 2]).run(executor)  # what passed through goes before what was kept
    assert opened.cached() == busiest | {ExpertKey(1, 1), ExpertKey(1, 2)}


def test_a_prompt_within_its_share_keeps_everything(opened: Opened) -> None:
    executor = Executor(opened.cache)
    call = Call(0, 3).choosing([0, 1], [1, 0], [0, 0])
    call.run(executor)
    Call(1, 2).choosing([4, 5], [4, 5]).run(executor)
    assert call.experts <= opened.cached()


def test_experts_in_memory_are_computed_while_others_are_read(tiny: TinyExperts) -> None:
    events = []

    class Watched(RecordingDisk):
        def read(self, plan: ReadPlan, slot: memoryview, *, urgent: bool = True) -> Ticket:
            events.append("read starts")
            inner = super().read(plan, slot)

            class Watching:
                def done(self) -> bool:
                    return False

                def wait(self) -> None:
                    inner.wait()
                    events.append("read ends")

            return Watching()

    def activate(up_N2F: torch.Tensor) -> torch.Tensor:
        events.append(f"computes {up_N2F.shape[0]}")
        return gated(up_N2F)

    with open_cache(tiny, num_slots=4, disk_type=Watched) as opened:
        executor, math = Executor(opened.cache), make_math(activate)
        Call(0, 1).choosing([0, 1]).run(executor, math)
        events.clear()
        Call(0, 1).choosing([0, 1, 2]).run(executor, math)
    assert events[0] == "read starts"
    assert events.index("read ends") > max(idx for idx, event in enumerate(events[:-1]) if event.startswith("computes"))


def test_reads_in_flight_are_bounded(tiny: TinyExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "MAX_READS_IN_FLIGHT", 3)
    in_flight, most = [0], [0]

    class Counting(LateDisk):
        def read(self, plan: ReadPlan, slot: memoryview, *, urgent: bool = True) -> Ticket:
            in_flight[0] += 1
            most[0] = max(most[0], in_flight[0])

            def ends() -> None:
                RecordingDisk.read(self, plan, slot).wait()
                in_flight[0] -= 1

            return LateTicket(ends, self.chance)

    with open_cache(tiny, num_slots=16, disk_type=Counting) as opened:
        Call(0, 64).run(Executor(opened.cache))
    assert (most, in_flight) == ([3], [0])


# --- failures leave nothing behind


@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("bad", range(3))
def test_a_failing_expert_fails_the_call_and_nothing_else(opened: Opened, num_tokens: int, bad: int) -> None:
    executor = Executor(opened.cache)
    Call(0, 1).choosing([0, 5]).run(executor)
    call = Call(0, num_tokens, top_k=4).choosing(*[[0, 1, 2, 3]] * num_tokens)
    with failing_reads(opened, ExpertKey(0, bad)):
        if bad == 0:  # it is in memory: no read, no failure
            call.run(executor)
        else:
            with pytest.raises(DiskReadError, match="check the drive"):
                call.run(executor)
        opened.assert_at_rest()
        assert (ExpertKey(0, bad) in opened.cached()) == (bad == 0)
        others = Call(0, num_tokens, seed=1).choosing(*[[4, 7]] * num_tokens)
        torch.testing.assert_close(others.run(executor), others.eager(opened.tiny), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(call.run(executor), call.eager(opened.tiny), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("after", [0, 1])
def test_a_call_stopped_while_computing_leaves_nothing_behind(
    tiny: TinyExperts, num_tokens: int, error: type[BaseException], after: int
) -> None:
    """With a hit and with reads under way; `after` as many computations."""
    left = [after]

    def activate(up_N2F: torch.Tensor) -> torch.Tensor:
        if not left[0]:
            raise error
        left[0] -= 1
        return gated(up_N2F)

    call = Call(0, num_tokens, top_k=5).choosing(*[[0, 1, 2, 3, 4]] * num_tokens)
    with open_cache(tiny, num_slots=4, disk_type=LateDisk) as opened:
        executor = Executor(opened.cache)
        Call(0, 1).choosing([0]).run(executor)
        with pytest.raises(error):
            call.run(executor, make_math(activate))
        opened.assert_at_rest()
        torch.testing.assert_close(call.run(executor), call.eager(tiny), rtol=1e-5, atol=1e-5)
        opened.assert_at_rest()


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_call_stopped_while_waiting_leaves_nothing_behind(tiny: TinyExperts, num_tokens: int) -> None:
    class Interrupted(LateDisk):
        presses = 1

        def read(self, plan: ReadPlan, slot: memoryview, *, urgent: bool = True) -> Ticket:
            def read() -> None:
                if self.presses and len(self.plans_read) >= 1:
                    self.presses -= 1
                    raise KeyboardInterrupt
                RecordingDisk.read(self, plan, slot).wait()

            return LateTicket(read, self.chance)

    call = Call(0, num_tokens, top_k=4).choosing(*[[0, 1, 2, 3]] * num_tokens)
    with open_cache(tiny, num_slots=3, disk_type=Interrupted) as opened:
        with pytest.raises(KeyboardInterrupt):
            call.run(Executor(opened.cache))
        opened.assert_at_rest()
        torch.testing.assert_close(call.run(Executor(opened.cache)), call.eager(tiny), rtol=1e-5, atol=1e-5)
        opened.assert_at_rest()
