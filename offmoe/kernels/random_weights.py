"""Weights made up in place, plain or quantised: outputs are then about as large as the inputs."""

from __future__ import annotations

import math

import torch

from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantFormat
from offmoe.formats.dense import STORED_DTYPES
from offmoe.formats.packed_sizes import HEAD_BYTES, row_bytes
from offmoe.formats.quantised import QuantMatrix

# The root mean square of values whose codes are as likely each.
_SPREAD = {
    "int4": 4.6, "int8": 74.0, "mxfp4": 2.9, "fp8": 130.0,
    "q4_0": 4.6, "q8_0": 74.0, "q4_k": 260.0, "q5_k": 530.0, "q6_k": 1370.0, "mxfp4_gguf": 2.9,
    "iq4_nl": 67.4, "iq4_xs": 1246.3,
}  # fmt: skip
# Where a GGUF block has its float16 scales, and their sizes: a minimum's is that of the mean code.
_HALVES: dict[str, dict[int, float]] = {
    "q4_0": {0: 1.0}, "q8_0": {0: 1.0}, "q4_k": {0: 1.0, 2: 7.5}, "q5_k": {0: 1.0, 2: 15.5}, "q6_k": {208: 1.0},
    "iq4_nl": {0: 1.0}, "iq4_xs": {0: 1.0},
}  # fmt: skip


def blank_matrix(form: QuantFormat | None, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor | QuantMatrix:
    """Memory for a matrix of (outputs, inputs), a plain one in `dtype`; int4 and int8 in words of 32 bits."""
    num_out, num_in = shape
    if form is None:
        return torch.empty(shape, dtype=dtype)
    if form.is_blocks:
        block = BLOCK_KINDS[form.kind]
        block_bytes = num_in // block.num_columns * block.num_bytes
        return QuantMatrix(form, shape, torch.empty(num_out, block_bytes, dtype=torch.uint8), None, None)
    if form.kind == "packed":
        heads, escapes = torch.empty(num_out, HEAD_BYTES, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32)
        return QuantMatrix(form, shape, torch.empty(num_out, row_bytes(num_in), dtype=torch.uint8), heads, escapes)
    groups = -(-num_in // form.group)
    scales = torch.empty(-(-num_out // form.group_rows), groups, dtype=STORED_DTYPES[form.scale_dtype])
    if form.kind in ("fp8", "mxfp4"):
        per_item, stored = (1, torch.float8_e4m3fn) if form.kind == "fp8" else (2, torch.uint8)
        return QuantMatrix(form, shape, torch.empty(num_out, num_in // per_item, dtype=stored), scales, None)
    per_word = 8 if form.kind == "int4" else 4
    codes = torch.empty(num_out, num_in // per_word, dtype=torch.int32)
    zeros = None if form.symmetric else torch.empty(-(-num_out // per_word), groups, dtype=torch.int32)
    return QuantMatrix(form, shape, codes, scales, zeros)


def fill_at_random(part: torch.Tensor | QuantMatrix, num_in: int, generator: torch.Generator) -> None:
    """Fill a matrix of `num_in` inputs where it lies; no copy is made, for which there may be no room any more.

    Of GGUF's blocks the kinds that the CPU kernels read.
    """
    if isinstance(part, torch.Tensor):
        part.normal_(std=num_in**-0.5, generator=generator)
        return
    _fill_codes(part.codes, generator)
    if part.format.is_blocks:
        _scale_blocks(part, num_in**-0.5 / _SPREAD[part.format.kind], generator)
        return
    if part.zeros is not None:
        _fill_codes(part.zeros, generator)
    assert part.scales is not None, f"{part.format=}"
    if part.format.kind == "packed":  # no escapes; exponents of numbers below num_in**-0.5
        largest = 126 - (num_in.bit_length() - 1) // 2
        part.scales.copy_(torch.tensor([0, 0, 0, 0, 0, 0, largest - 14, largest - 15], dtype=torch.uint8))
        return
    scale = num_in**-0.5 / _SPREAD[part.format.kind]
    if part.format.scale_dtype == "U8":
        exponent = 127 + round(math.log2(scale))
        part.scales.random_(exponent - 1, exponent + 2, generator=generator)
    else:
        part.scales.uniform_(0.5 * scale, 1.5 * scale, generator=generator)


def _fill_codes(codes: torch.Tensor, generator: torch.Generator) -> None:
    """Every bit at random; of float8 all but the last, which NaN needs."""
    if codes.dtype == torch.float8_e4m3fn:
        codes.view(torch.uint8).random_(0, 256, generator=generator).bitwise_and_(0xFE)
    elif codes.dtype == torch.int32:
        codes.random_(-(1 << 31), (1 << 31) - 1, generator=generator)
    else:
        info = torch.iinfo(codes.dtype)
        codes.random_(info.min, info.max + 1, generator=generator)


def _scale_blocks(part: QuantMatrix, scale: float, generator: torch.Generator) -> None:
    kind = part.format.kind
    blocks_NBn = part.codes.unflatten(1, (-1, BLOCK_KINDS[kind].num_bytes))
    if kind == "mxfp4_gguf":
        exponent = 127 + round(math.log2(scale))
        blocks_NBn[:, :, 0].random_(exponent - 1, exponent + 2, generator=generator)
        return
    for at, size in _HALVES[kind].items():
        scales_NB1 = torch.empty(*blocks_NBn.shape[:2], 1, device=part.codes.device)
        scales_NB1.uniform_(0.5 * scale * size, 1.5 * scale * size, generator=generator)
        blocks_NBn[:, :, at : at + 2] = scales_NB1.to(torch.float16).view(torch.uint8)
