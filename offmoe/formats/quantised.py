"""A quantised matrix as tensors, and what its values are: the plain torch that every kernel is checked against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from offmoe.checkpoint.quant_format import QuantFormat

ALL_ROWS = slice(None)
# A block of rows: whole blocks of fp8's scales, and what the caches of a core hold.
BLOCK_VALUES, BLOCK_ROWS = 1 << 19, 128


@dataclass(frozen=True, slots=True)
class QuantMatrix:
    """A matrix of `shape` (N outputs, K inputs), always that way round. `quant_format.py` has the layouts.

    The tensors may be strided views of a slot; they are as stored, and valid as long as the slot is held.
    """

    format: QuantFormat
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def dequantise(self, dtype: torch.dtype, rows: slice = ALL_ROWS) -> torch.Tensor:
        """Rows as values, (R, K): computed in float32, then rounded to `dtype` once. `rows` has no step.

        Bit for bit what compressed-tensors and transformers make of the files where their scales are of `dtype` or
        float32. (With scales of a narrower type than `dtype` compressed-tensors rounds the product to that type first.)
        """
        begin, end, step = rows.indices(self.shape[0])
        assert step == 1, f"{rows=}"
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
        scales = self.scales[rows]
        if self.format.scale_dtype == "U8":
            exponents = scales.to(torch.int32)  # as a float32's own; 2**-127 alone is one of its small numbers
            return torch.where(exponents == 0, 1 << 22, exponents << 23).view(torch.float32)
        return scales.float()


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(R, C) words of 32 bits -> (R, C * 32 / bits) bytes, lowest bits first."""
    in_bytes = words.view(torch.uint8)
    return in_bytes if bits == 8 else torch.stack((in_bytes & 15, in_bytes >> 4), dim=-1).flatten(1)


def _integers(matrix: QuantMatrix, rows: slice) -> torch.Tensor:
    bits = 4 if matrix.format.kind == "int4" else 8
    codes = matrix.codes[rows]
    values = (_unpacked(codes, bits) if codes.dtype == torch.int32 else codes).float()
    if matrix.zeros is None:
        return values.sub_(matrix.format.offset) if matrix.format.offset else values
    zeros = matrix.zeros
    if zeros.dtype == torch.int32:  # packed down the rows
        per_word = 32 // bits
        first = rows.start // per_word
        words = zeros[first : -(-rows.stop // per_word)].t().contiguous()
        zeros = _unpacked(words, bits).t()[rows.start - first * per_word : rows.stop - first * per_word]
    else:
        zeros = zeros[rows]
    values.view(len(values), -1, matrix.format.group).sub_(zeros.float()[:, :, None])
    return values


def _e2m1(matrix: QuantMatrix, rows: slice) -> torch.Tensor:
    """The three bits below the sign are a float16's lowest exponent bits and first mantissa bit: 2**14 too small.

    True of its small numbers as well, so no table is looked up (an index_select is three times slower).
    """
    codes = matrix.codes[rows]
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).to(torch.int16)
    bits = ((nibbles << 12) & -0x8000) | ((nibbles << 9) & 0x0E00)
    return bits.view(torch.float16).float().mul_(2.0**14)


def _e4m3(matrix: QuantMatrix, rows: slice) -> torch.Tensor:
    """As `_e2m1`: a float16 2**8 too small. torch's own conversion, which knows the NaNs, is slower."""
    codes = matrix.codes[rows]
    in_bytes = codes.view(torch.uint8)
    if codes.device.type != "cpu" or int((in_bytes & 127).amax()) == 127:
        return codes.float()
    bits = ((in_bytes.to(torch.int16) << 8) >> 1) & ~0x4000
    return bits.view(torch.float16).float().mul_(2.0**8)


_VALUES: dict[str, Callable[[QuantMatrix, slice], torch.Tensor]] = {
    "int4": _integers, "int8": _integers, "mxfp4": _e2m1, "fp8": _e4m3,
}  # fmt: skip
