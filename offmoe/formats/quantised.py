"""A quantised matrix as tensors, and what its values are: the plain torch that every kernel is checked against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.formats.blocks import block_values
from offmoe.formats.packed import packed_values

# The sixteen values of e2m1: 1 sign bit, 2 exponent bits, 1 mantissa bit. And of four bits with 8 added.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
INT4_VALUES = tuple(float(value) for value in range(-8, 8))
ALL_ROWS = slice(None)
# A block of rows: whole blocks of fp8's scales, and what the caches of a core hold.
BLOCK_VALUES, BLOCK_ROWS = 1 << 19, 128


@dataclass(frozen=True, slots=True)
class QuantMatrix:
    """A matrix of `shape` (N outputs, K inputs), always that way round. `quant_format.py` has the layouts.

    GGUF's blocks are codes alone. The tensors may be strided views of a slot; they are as stored, and valid as long as
    the slot is held. `faster` gives rows of a packed matrix as bfloat16: the same as here, by kernels.
    """

    format: QuantFormat
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    faster: Callable[[QuantMatrix, slice], torch.Tensor] | None = None

    def dequantise(self, dtype: torch.dtype, rows: slice = ALL_ROWS) -> torch.Tensor:
        """Rows as values, (R, K): computed in float32, then rounded to `dtype` once. `rows` has no step.

        Bit for bit what compressed-tensors and transformers make of the files where their scales are of `dtype` or
        float32. (With scales of a narrower type than `dtype` compressed-tensors rounds the product to that type first.)
        """
        begin, end, step = rows.indices(self.shape[0])
        assert step == 1, f"{rows=}"
        if self.format.is_lossless:
            if self.faster is not None:
                return self.faster(self, slice(begin, end)).to(dtype)
            assert self.scales is not None and self.zeros is not None, f"{self.format=}"
            rows = slice(begin, end)
            return packed_values(self.codes[rows], self.scales[rows], self.zeros, self.shape[1]).to(dtype)
        if self.format.is_blocks:
            return block_values(self.format.kind, self.codes[begin:end]).to(dtype)
        values = _VALUES[self.format.kind](self, slice(begin, end))
        first = begin // self.format.group_rows
        last = -(-end // self.format.group_rows)
        scales = self._scale_values(slice(first, last))
        if self.format.group_rows > 1:
            skip = begin - first * self.format.group_rows
            scales = scales.repeat_interleave(self.format.group_rows, 0)[skip : skip + len(values)]
        num_rows, width = values.shape
        if width % self.format.group == 0:
            grouped = values.view(num_rows, -1, self.format.group)
            return grouped.mul_(scales[:, :, None]).view(num_rows, width).to(dtype)
        return (values * scales.repeat_interleave(self.format.group, 1)[:, :width]).to(dtype)

    def row_blocks(self) -> Iterator[slice]:
        """Slices of rows whose values are few enough to exist at once: a block is about 4 MiB in float32."""
        num_rows, width = self.shape
        step = max(BLOCK_VALUES // width // BLOCK_ROWS * BLOCK_ROWS, BLOCK_ROWS)
        return (slice(begin, begin + step) for begin in range(0, num_rows, step))

    def _scale_values(self, rows: slice) -> torch.Tensor:
        assert self.scales is not None, f"{self.format=}"
        scales = self.scales[rows]
        if self.format.scale_dtype == "U8":
            exponents = scales.to(torch.int32)  # as a float32's own; 2**-127 alone is one of its small numbers
            return torch.where(exponents == 0, 1 << 22, exponents << 23).view(torch.float32)
        return scales.float()


@lru_cache
def _pair_table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Byte -> the values of its two halves, low one first, as one 64-bit word: one look-up for two values."""
    low_high = torch.cartesian_prod(torch.tensor(values), torch.tensor(values)).flip(1).contiguous()
    return low_high.view(torch.int64).view(-1).to(device)


def _look_up(bytes_RC: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
    """Two values a byte: (R, C) -> (R, 2 * C) float32."""
    found = _pair_table(values, bytes_RC.device).index_select(0, bytes_RC.flatten().int())
    return found.view(torch.float32).view(len(bytes_RC), -1)


def _e2m1(matrix: QuantMatrix, rows: slice) -> torch.Tensor:
    return _look_up(matrix.codes[rows], E2M1_VALUES)


def _int4(matrix: QuantMatrix, rows: slice) -> torch.Tensor:
    return _less_zeros(_look_up(matrix.codes[rows].view(torch.uint8), INT4_VALUES), matrix, rows, 4)


def _int8(matrix: QuantMatrix, rows: slice) -> torch.Tensor:
    codes = matrix.codes[rows]
    if codes.dtype == torch.int8:
        return _less_zeros(codes.float(), matrix, rows, 8)
    return _less_zeros(codes.view(torch.uint8).float().sub_(matrix.format.offset), matrix, rows, 8)


def _less_zeros(values: torch.Tensor, matrix: QuantMatrix, rows: slice, bits: int) -> torch.Tensor:
    zeros = matrix.zeros
    if zeros is None:
        return values
    if zeros.dtype == torch.int32:  # packed down the rows, `offset` added
        per_word = 32 // bits
        first = rows.start // per_word
        words = zeros[first : -(-rows.stop // per_word)].t()
        in_bytes = words.contiguous().view(-1).view(torch.uint8).view(len(words), -1)
        unpacked = _look_up(in_bytes, INT4_VALUES) if bits == 4 else in_bytes.float() - 128
        zeros = unpacked.t()[rows.start - first * per_word : rows.stop - first * per_word]
    else:
        zeros = zeros[rows]
    values.view(len(values), -1, matrix.format.group).sub_(zeros.float()[:, :, None])
    return values


def _e4m3(matrix: QuantMatrix, rows: slice) -> torch.Tensor:
    """Seven bits below the sign are a float16's low exponent bits and first mantissa bits: 2**8 too small.

    True of its small numbers as well. torch's own conversion, which knows the NaNs, is slower.
    """
    codes = matrix.codes[rows]
    in_bytes = codes.view(torch.uint8)
    if codes.device.type != "cpu" or int((in_bytes & 127).amax()) == 127:
        return codes.float()
    bits = ((in_bytes.to(torch.int16) << 8) >> 1) & ~0x4000
    return bits.view(torch.float16).float().mul_(2.0**8)


_VALUES: dict[str, Callable[[QuantMatrix, slice], torch.Tensor]] = {
    "int4": _int4, "int8": _int8, "mxfp4": _e2m1, "fp8": _e4m3,
}  # fmt: skip
