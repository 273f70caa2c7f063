"""Random experts of one format in slots of a pool, as in the engine, to time products on."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.checkpoint.shard_file import DIRECT_ALIGN_BYTES
from offmoe.formats.dense import ExpertWeights
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.random_weights import fill_at_random
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
        shift: int = 0,
    ) -> None:  # fmt: skip
        """`shift`: bytes from a cache line's begin to each expert, less than 4096."""
        self.experts_a_call = experts_a_call
        self.width_D, self.width_F = width_D, width_F
        self.math = ExpertMath(
            activate=_swiglu, up_bias_EF=None, down_bias_ED=None, post_norm=None, transposed=turned,
            dtype=torch.bfloat16,
        )  # fmt: skip
        shapes = ((2 * width_F, width_D), (width_D, width_F))
        if turned:
            shapes = ((width_D, 2 * width_F), (width_F, width_D))
        self.expert_bytes = sum(tensor.nbytes for shape in shapes for tensor in _tensors(_blank(form, shape)))
        num_calls = max(2, -(-working_set // (experts_a_call * self.expert_bytes)))
        slot_bytes = (-(-self.expert_bytes // DIRECT_ALIGN_BYTES) + 1) * DIRECT_ALIGN_BYTES
        self.pool = HostPool(num_slots=num_calls * experts_a_call, slot_bytes=slot_bytes)
        generator = torch.Generator().manual_seed(0)
        first = [_blank(form, shape) for shape in shapes]
        for matrix, shape in zip(first, shapes, strict=True):
            fill_at_random(matrix, shape[1], generator)
        self.weights = []
        for slot in range(self.pool.num_slots):  # all alike: speed does not depend on the values
            up, down = _placed(first, self.pool.tensor(slot)[shift:])
            self.weights.append(ExpertWeights((up,), (down,)))

    def bytes_per_s(self, kernels: CpuKernels | None, *, num_tokens: int = 1, repeats: int = REPEATS) -> float:
        """Weights read a second, all experts in turn; by the reference where there are no kernels."""
        seconds = usual_s(self._run(kernels, num_tokens), repeats)
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

    def _run(self, kernels: CpuKernels | None, num_tokens: int) -> Callable[[], None]:
        x_TD = torch.randn(num_tokens, self.width_D).to(torch.bfloat16)
        each = self.experts_a_call
        calls = [range(at, at + each) for at in range(0, len(self.weights), each)]
        if kernels is None:

            def by_torch() -> None:
                for call in calls:
                    experts_forward(self.math, [(idx, self.weights[idx], x_TD) for idx in call])

            return by_torch
        layer = kernels.layer(self.math, self.weights[0])
        y_SD = torch.empty(num_tokens * each, self.width_D, dtype=torch.bfloat16)
        weights_TK = torch.rand(1, each) if num_tokens == 1 else None
        tokens = range(num_tokens)
        rows = [
            [(idx, self.weights[idx], tokens, range(at * num_tokens, (at + 1) * num_tokens))
             for at, idx in enumerate(call)]
            for call in calls
        ]  # fmt: skip

        def by_kernels() -> None:
            for one in rows:
                kernels.experts(layer, one, x_TD, y_SD, weights_TK)

        return by_kernels


def _swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value


def _blank(form: QuantFormat | None, shape: tuple[int, int]) -> torch.Tensor | QuantMatrix:
    rows, columns = shape
    if form is None:
        return torch.empty(shape, dtype=torch.bfloat16)
    if form.kind == "fp8":
        scales = torch.empty(-(-rows // form.group_rows), -(-columns // form.group), dtype=torch.float32)
        return QuantMatrix(form, shape, torch.empty(shape, dtype=torch.float8_e4m3fn), scales, None)
    if form.kind == "mxfp4":
        scales = torch.empty(rows, columns // form.group, dtype=torch.uint8)
        return QuantMatrix(form, shape, torch.empty(rows, columns // 2, dtype=torch.uint8), scales, None)
    per_word = 8 if form.kind == "int4" else 4
    scales = torch.empty(rows, columns // form.group, dtype=torch.bfloat16)
    return QuantMatrix(form, shape, torch.empty(rows, columns // per_word, dtype=torch.int32), scales, None)


def _tensors(weight: torch.Tensor | QuantMatrix) -> list[torch.Tensor]:
    if isinstance(weight, torch.Tensor):
        return [weight]
    return [tensor for tensor in (weight.codes, weight.scales) if tensor is not None]


def _placed(
    matrices: list[torch.Tensor | QuantMatrix], memory: torch.Tensor
) -> list[torch.Tensor | QuantMatrix]:  # fmt: skip
    """Copies of `matrices` in a slot, each tensor at a multiple of 64 bytes."""
    end, placed = 0, list[torch.Tensor | QuantMatrix]()
    for matrix in matrices:
        copies = []
        for tensor in _tensors(matrix):
            copies.append(memory[end : end + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor))
            end += -(-tensor.nbytes // 64) * 64
        if isinstance(matrix, torch.Tensor):
            placed.append(copies[0])
        else:
            placed.append(QuantMatrix(matrix.format, matrix.shape, copies[0], copies[1], None))
    return placed
