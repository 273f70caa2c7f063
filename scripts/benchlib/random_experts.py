"""Random experts of every format, many times larger than the caches, for timing what computes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantFormat, QuantKind
from offmoe.formats.dense import ExpertWeights
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu import CpuKernels
from offmoe.kernels.cpu.decode import CpuTokenExperts
from offmoe.kernels.cpu.kernels import CpuLayer
from offmoe.kernels.random_weights import fill_at_random
from offmoe.kernels.reference import ExpertMath, experts_forward
from offmoe.tiers.host import HostPool

EXPERTS_A_CALL = 8
Shape = tuple[int, int]
Weight = torch.Tensor | QuantMatrix
Step = Callable[[], object]


class Experts:
    """Random experts of one format, `working_set` bytes of them, and one layer's arithmetic on rows of `dtype`."""

    def __init__(
        self, make: Callable[[Shape], Weight], width: int, hidden: int, working_set: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        self.width, self.dtype = width, dtype
        self.math = ExpertMath(
            activate=swiglu, up_bias_EF=None, down_bias_ED=None, post_norm=None, transposed=False, dtype=dtype
        )
        first = ExpertWeights((make((2 * hidden, width)),), (make((width, hidden)),))
        self.expert_bytes = sum(num_bytes(part) for part in (*first.up, *first.down))
        calls = max(2, -(-working_set // (EXPERTS_A_CALL * self.expert_bytes)))
        # As in the engine: slots of a pool.
        self.pool = HostPool(num_slots=calls * EXPERTS_A_CALL, slot_bytes=(-(-self.expert_bytes // 4096) + 1) * 4096)
        self.weights = [
            self._placed(slot, make((2 * hidden, width)), make((width, hidden))) for slot in range(self.pool.num_slots)
        ]

    def _placed(self, slot: int, up: Weight, down: Weight) -> ExpertWeights:
        begin, memory = 0, self.pool.tensor(slot)

        def place(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal begin
            there = memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            begin += -(-tensor.nbytes // 64) * 64
            return there.copy_(tensor)

        return ExpertWeights(*((map_weight(weight, place),) for weight in (up, down)))

    def calls(self) -> list[range]:
        """The experts of every call."""
        return [range(at, at + EXPERTS_A_CALL) for at in range(0, len(self.weights), EXPERTS_A_CALL)]

    def by_kernels(self, kernels: CpuKernels, num_tokens: int) -> list[Step]:
        """Every call; one token's rows with their weighted sum, by the call that decoding makes."""
        layer = kernels.layer(self.math, self.weights[0])
        if num_tokens == 1:
            return self._decoding(kernels, layer)
        x_TD = torch.randn(num_tokens, self.width).to(self.dtype)
        y_SD = torch.empty(num_tokens * EXPERTS_A_CALL, self.width, dtype=torch.bfloat16)
        tokens = range(num_tokens)
        calls = [
            [
                (idx, self.weights[idx], tokens, range(at * num_tokens, (at + 1) * num_tokens))
                for at, idx in enumerate(call)
            ]
            for call in self.calls()
        ]

        return [partial(kernels.experts, layer, rows, x_TD, y_SD, None) for rows in calls]

    def _decoding(self, kernels: CpuKernels, layer: CpuLayer) -> list[Step]:
        x_1D, weights_1K = torch.randn(1, self.width).to(self.dtype), torch.rand(1, EXPERTS_A_CALL)
        token = CpuTokenExperts(kernels, layer, EXPERTS_A_CALL, x_1D, weights_1K)
        return [
            partial(token, list(call), [self.weights[idx] for idx in call], x_1D, weights_1K) for call in self.calls()
        ]

    def by_torch(self, num_tokens: int) -> list[Step]:
        """The same by the reference."""
        x_TD = torch.randn(num_tokens, self.width).to(self.dtype)
        return [
            partial(experts_forward, self.math, [(idx, self.weights[idx], x_TD) for idx in call])
            for call in self.calls()
        ]


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value


def map_weight(weight: Weight, change: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
    """The same of changed tensors."""
    if isinstance(weight, torch.Tensor):
        return change(weight)
    scales, zeros = (None if part is None else change(part) for part in (weight.scales, weight.zeros))
    return dataclasses.replace(weight, codes=change(weight.codes), scales=scales, zeros=zeros)


def num_bytes(weight: Weight) -> int:
    if isinstance(weight, torch.Tensor):
        return weight.nbytes
    return sum(tensor.nbytes for tensor in (weight.codes, weight.scales, weight.zeros) if tensor is not None)


def random_words(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32)


def random_scales(rows: int, columns: int) -> torch.Tensor:
    return (torch.rand(rows, columns) * 0.01 + 0.001).to(torch.bfloat16)


def integers(kind: str, shape: Shape, *, symmetric: bool = True) -> QuantMatrix:
    """int4 or int8 packed in words, groups of 32."""
    per_word, offset = (8, 8) if kind == "int4" else (4, 128)
    rows, columns = shape
    form = QuantFormat(kind="int4" if kind == "int4" else "int8", group=32, offset=offset, symmetric=symmetric)
    zeros = None if symmetric else random_words(-(-rows // per_word), columns // 32)
    return QuantMatrix(form, shape, random_words(rows, columns // per_word), random_scales(rows, columns // 32), zeros)


def mxfp4(shape: Shape) -> QuantMatrix:
    codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8)
    exponents = torch.randint(115, 120, (shape[0], shape[1] // 32), dtype=torch.uint8)
    return QuantMatrix(QuantFormat(kind="mxfp4", group=32, scale_dtype="U8"), shape, codes, exponents, None)


def fp8(shape: Shape) -> QuantMatrix:
    codes = torch.randint(0, 0x7F, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) * 0.001
    form = QuantFormat(kind="fp8", group=128, group_rows=128, scale_dtype="F32")
    return QuantMatrix(form, shape, codes, scales, None)


def blocks(kind: QuantKind, shape: Shape) -> QuantMatrix:
    """GGUF's."""
    block = BLOCK_KINDS[kind]
    codes = torch.empty(shape[0], shape[1] // block.num_columns * block.num_bytes, dtype=torch.uint8)
    form = QuantFormat(kind=kind, group=block.num_columns, scale_dtype="U8")
    matrix = QuantMatrix(form, shape, codes, None, None)
    fill_at_random(matrix, shape[1], torch.Generator().manual_seed(0))
    return matrix


FORMATS: dict[str, Callable[[Shape], Weight]] = {
    "bf16": lambda shape: (torch.randn(shape) * 0.02).to(torch.bfloat16),
    "int8": lambda shape: integers("int8", shape),
    "fp8": fp8,
    "int4": lambda shape: integers("int4", shape),
    "int4-zeros": lambda shape: integers("int4", shape, symmetric=False),
    "mxfp4": mxfp4,
    "q8_0": partial(blocks, "q8_0"),
    "q6_k": partial(blocks, "q6_k"),
    "q5_k": partial(blocks, "q5_k"),
    "q4_k": partial(blocks, "q4_k"),
    "q4_0": partial(blocks, "q4_0"),
    "mxfp4-gguf": partial(blocks, "mxfp4_gguf"),
}
