"""Random experts of one format in slots of a pool, as in the engine, to time products on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.checkpoint.shard_file import DIRECT_ALIGN_BYTES
from offmoe.formats.dense import ExpertWeights
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu.decode import CpuTokenExperts
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.random_weights import blank_matrix, fill_at_random
from offmoe.kernels.reference import ExpertMath, experts_forward
from offmoe.tiers.host import HostPool

REPEATS, MOST_S = 5, 1.0
# Experts of Qwen3-30B-A3B's shape, more of them than caches hold: 8 a call.
WIDTH_D, WIDTH_F, EXPERTS_A_CALL, WORKING_SET_BYTES = 2048, 768, 8, 150 << 20
FLOPS_ROWS = 64


def best_s(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The shortest seconds of `repeats` runs, after one that does not count."""
    return min(_times_s(work, repeats))


def usual_s(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median seconds, likewise."""
    return median(_times_s(work, repeats))


def _times_s(work: Callable[[], object], repeats: int) -> list[float]:
    """One run at least; no further one after MOST_S."""
    first = time.perf_counter()
    work()
    times: list[float] = []
    while not times or (len(times) < repeats and time.perf_counter() - first < MOST_S):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return times


class SampleExperts:
    """Random experts of one format in slots of a pool, as in the engine."""

    def __init__(
        self, form: QuantFormat | None, *, width_D: int = WIDTH_D, width_F: int = WIDTH_F,
        working_set: int = WORKING_SET_BYTES, turned: bool = False, experts_a_call: int = EXPERTS_A_CALL,
        shift: int = 0, dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        """`shift`: bytes from a cache line's begin to each expert, less than 4096; `dtype`: the rows'. Plain experts
        are in bfloat16.
        """
        self.experts_a_call = experts_a_call
        self.width_D, self.width_F = width_D, width_F
        self.math = ExpertMath(
            activate=_swiglu, up_bias_EF=None, down_bias_ED=None, post_norm=None, transposed=turned, dtype=dtype
        )
        shapes = ((2 * width_F, width_D), (width_D, width_F))
        if turned:
            shapes = ((width_D, 2 * width_F), (width_F, width_D))
        first = [blank_matrix(form, shape, torch.bfloat16) for shape in shapes]
        self.expert_bytes = sum(tensor.nbytes for matrix in first for tensor in _tensors(matrix))
        num_calls = max(2, -(-working_set // (experts_a_call * self.expert_bytes)))
        slot_bytes = (-(-self.expert_bytes // DIRECT_ALIGN_BYTES) + 1) * DIRECT_ALIGN_BYTES
        self.pool = HostPool(num_slots=num_calls * experts_a_call, slot_bytes=slot_bytes)
        generator = torch.Generator().manual_seed(0)
        for matrix, shape in zip(first, shapes, strict=True):
            fill_at_random(matrix, shape[1], generator)
        self.weights = []
        for slot in range(self.pool.num_slots):  # all alike: speed does not depend on the values
            up, down = _placed(first, self.pool.tensor(slot)[shift:])
            self.weights.append(ExpertWeights((up,), (down,)))

    def bytes_per_s(self, kernels: CpuKernels | None, *, num_tokens: int = 1, repeats: int = REPEATS) -> float:
        """Weights read a second, all experts in turn; by the reference where there are no kernels."""
        calls = self.calls(kernels, num_tokens)
        seconds = usual_s(lambda: [call() for call in calls], repeats)
        return len(self.weights) * self.expert_bytes / seconds

    def flops_per_s(self, kernels: CpuKernels | None) -> float:
        """Operations a second when many rows use an expert."""
        rate = self.bytes_per_s(kernels, num_tokens=FLOPS_ROWS, repeats=1)
        num_weights = 3 * self.width_D * self.width_F
        return 2 * num_weights * FLOPS_ROWS * rate / self.expert_bytes

    def close(self) -> None:
        """Give the memory back."""
        self.weights.clear()
        self.pool.close()

    def calls(self, kernels: CpuKernels | None, num_tokens: int) -> list[Callable[[], object]]:
        """Calls that compute all experts in turn, `experts_a_call` at once, each for `num_tokens` rows.

        One token's as when it is decoded, with their weighted sum. By the reference where there are no kernels.
        """
        x_TD = torch.randn(num_tokens, self.width_D).to(self.math.dtype)
        calls = [range(at, at + self.experts_a_call) for at in range(0, len(self.weights), self.experts_a_call)]
        if kernels is None:
            return [
                partial(experts_forward, self.math, [(idx, self.weights[idx], x_TD) for idx in call]) for call in calls
            ]
        layer = kernels.layer(self.math, self.weights[0])
        if num_tokens == 1:
            weights_1K = torch.rand(1, self.experts_a_call)
            token = CpuTokenExperts(kernels, layer, self.experts_a_call, x_TD, weights_1K)
            return [partial(token, call, [self.weights[idx] for idx in call], x_TD, weights_1K) for call in calls]
        y_SD = torch.empty(num_tokens * self.experts_a_call, self.width_D, dtype=self.math.dtype)
        rows = [
            [(idx, self.weights[idx], range(num_tokens), range(at * num_tokens, (at + 1) * num_tokens))
             for at, idx in enumerate(call)]
            for call in calls
        ]  # fmt: skip
        return [partial(kernels.experts, layer, one, x_TD, y_SD) for one in rows]


def _swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value


def _tensors(weight: torch.Tensor | QuantMatrix) -> list[torch.Tensor]:
    if isinstance(weight, torch.Tensor):
        return [weight]
    return [tensor for tensor in (weight.codes, weight.scales, weight.zeros) if tensor is not None]


def _placed(matrices: list[torch.Tensor | QuantMatrix], memory: torch.Tensor) -> list[torch.Tensor | QuantMatrix]:
    """Copies of `matrices` in a slot, each tensor at a multiple of 64 bytes."""
    end = 0

    def place(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal end
        there = memory[end : end + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        end += -(-tensor.nbytes // 64) * 64
        return there.copy_(tensor)

    placed = list[torch.Tensor | QuantMatrix]()
    for matrix in matrices:
        if isinstance(matrix, torch.Tensor):
            placed.append(place(matrix))
        else:
            scales, zeros = (None if part is None else place(part) for part in (matrix.scales, matrix.zeros))
            placed.append(replace(matrix, codes=place(matrix.codes), scales=scales, zeros=zeros))
    return placed
