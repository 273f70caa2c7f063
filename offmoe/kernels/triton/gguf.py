"""GGUF's blocks inside the Triton kernels: bytes to codes, scales and minima.

`FORMAT` is a `codes.Blocks`, places are in bytes. In every kind 16 columns, a *span*, have a scale and a minimum in
common, and their codes' bytes lie side by side: one index a span finds them all. Codes are small integers, put into the
mantissa of 2^23, which is then subtracted: that costs less than a conversion; e2m1 as in `triton_quantised`. Values are
to the bit those of `formats.blocks`, which names ggml's own source.

Shapes: O outputs, K rows of inputs, S spans of 16 columns.
"""

# Constants are decided at compile time, nested, and not every one is an expression.
# ruff: noqa: SIM108

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.triton.blocks import output_places


@triton.jit
def _codes(byte_ptr, at, within, mask, FORMAT: tl.constexpr):
    """(O, K, S, 16) float32: what the scales are for. `at` (O, K, S) is a span's block, `within` its number there."""
    if FORMAT.kind == "q8_0":
        first = 2 + within * 16
    elif FORMAT.num_columns == 32:  # low nibbles, high nibbles of the same bytes
        first = FORMAT.first_code + within * 0
        shifts = within * 4
    elif FORMAT.kind == "q6_k":
        first = within // 8 * 64 + within % 4 * 16
        shifts = within % 8 // 4 * 4
    else:
        first = FORMAT.first_code + within // 4 * 32 + within % 2 * 16
        shifts = within // 2 % 2 * 4
    mask = mask[:, :, :, None]
    codes_at = byte_ptr + (at + first[None, None, :])[:, :, :, None] + tl.arange(0, 16)[None, None, None, :]
    codes = tl.load(codes_at, mask=mask, other=0).to(tl.int32)
    if FORMAT.kind == "q8_0":
        codes = codes ^ 128  # 128 added
    else:
        codes = (codes >> shifts[None, None, :, None]) & 15
    if FORMAT.upper_bits > 0:
        if FORMAT.kind == "q6_k":
            upper = 128 + within // 8 * 32 + within % 2 * 16
            places_of_upper = within % 8 // 2 * 2
        else:
            upper = 16 + within % 2 * 16
            places_of_upper = within // 2
        upper_at = byte_ptr + (at + upper[None, None, :])[:, :, :, None] + tl.arange(0, 16)[None, None, None, :]
        bits = tl.load(upper_at, mask=mask, other=0).to(tl.int32) >> places_of_upper[None, None, :, None]
        codes |= (bits & ((1 << FORMAT.upper_bits) - 1)) << 4
    if FORMAT.kind == "mxfp4_gguf":  # twice the value, as the scale is half of it
        values = (((codes & 8) << 28) | ((codes & 7) << 22)).to(tl.float32, bitcast=True) * 2.0**127
    else:
        values = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (2.0**23 + FORMAT.offset)
    return values


@triton.jit
def _scales(byte_ptr, half_ptr, at, within, mask, FORMAT: tl.constexpr):
    """(O, K, S) float32 scales, and minima where the kind has them; 0 outside."""
    within = within[None, None, :]
    if FORMAT.kind == "mxfp4_gguf":  # half of 2^(e - 127); at 0 and 1 that is subnormal
        exponent = tl.load(byte_ptr + at, mask=mask, other=0).to(tl.int32)
        bits = tl.where(exponent < 2, 0x00200000 << (exponent & 1), (exponent - 1) << 23)
        scales = bits.to(tl.float32, bitcast=True)
    else:
        scales = tl.load(half_ptr + (at + FORMAT.scale_at) // 2, mask=mask, other=0.0).to(tl.float32)
    minima = scales
    if FORMAT.kind == "q6_k":
        number = tl.load(byte_ptr + at + 192 + within, mask=mask, other=0).to(tl.int32)
        scales *= ((number ^ 128) - 128).to(tl.float32)
    elif FORMAT.has_minima:  # eight scales and eight minima of six bits in twelve bytes
        group = within // 2
        bytes_at = byte_ptr + at + 4 + group % 4
        first = tl.load(bytes_at, mask=mask, other=0).to(tl.int32)
        second = tl.load(bytes_at + 4, mask=mask, other=0).to(tl.int32)
        third = tl.load(bytes_at + 8, mask=mask, other=0).to(tl.int32)
        number = tl.where(group < 4, first & 63, (third & 15) | (first >> 6 << 4))
        scales *= number.to(tl.float32)
        number = tl.where(group < 4, second & 63, (third >> 4) | (second >> 6 << 4))
        minima = tl.load(half_ptr + at // 2 + 1, mask=mask, other=0.0).to(tl.float32) * number.to(tl.float32)
    return scales, minima


@triton.jit
def gguf_row_products(
    in_ptr, in_rows, ready, byte_ptr, half_ptr, slot, block, inside,
    NUM_IN: tl.constexpr, SLOT: tl.constexpr, BASE: tl.constexpr, OUT_STRIDE: tl.constexpr, PAIRS: tl.constexpr,
    PAIR_STRIDE: tl.constexpr, FORMAT: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """(O, K) float32: row k of the inputs with the outputs of its slot, 0 where `ready` is false."""
    SPANS: tl.constexpr = BLOCK_IN // 16
    K: tl.constexpr = in_rows.shape[0]
    rows_at = output_places(block, OUT_STRIDE, PAIR_STRIDE, PAIRS, BLOCK_OUT)[:, None] + (slot * SLOT + BASE)[None, :]
    used = inside[:, None, None] & ready[None, :, None]
    sums = tl.zeros((inside.shape[0], K, SPANS), tl.float32)
    for begin in tl.range(0, NUM_IN, BLOCK_IN, num_stages=STAGES):
        spans = begin // 16 + tl.arange(0, SPANS)
        mask = used & (spans < NUM_IN // 16)[None, None, :]
        at = rows_at[:, :, None] + (spans // FORMAT.num_spans * FORMAT.num_bytes)[None, None, :]
        scales, minima = _scales(byte_ptr, half_ptr, at, spans % FORMAT.num_spans, mask, FORMAT)
        inputs = begin + tl.arange(0, BLOCK_IN)
        in_mask = ready[:, None] & (inputs[None, :] < NUM_IN)
        x = tl.load(in_ptr + in_rows[:, None] * NUM_IN + inputs[None, :], mask=in_mask, other=0.0).to(tl.float32)
        x = tl.reshape(x, (1, K, SPANS, 16))
        codes = _codes(byte_ptr, at, spans % FORMAT.num_spans, mask, FORMAT)
        sums += tl.sum(codes * x, axis=3) * scales
        if FORMAT.has_minima:
            sums -= tl.sum(x, axis=3) * minima
    return tl.sum(sums, axis=2)


@triton.jit
def gguf_weight_block(
    byte_ptr, half_ptr, slot, block, inside, begin, like_ptr,
    NUM_IN: tl.constexpr, SLOT: tl.constexpr, BASE: tl.constexpr, OUT_STRIDE: tl.constexpr, PAIRS: tl.constexpr,
    PAIR_STRIDE: tl.constexpr, FORMAT: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """(BLOCK_IN, O): the values from column `begin` on, computed in float32, rounded to the type of `like_ptr`."""
    rows_at = slot * SLOT + BASE + output_places(block, OUT_STRIDE, PAIR_STRIDE, PAIRS, BLOCK_OUT)
    spans = begin // 16 + tl.arange(0, BLOCK_IN // 16)
    within = spans % FORMAT.num_spans
    mask = inside[:, None, None] & (spans < NUM_IN // 16)[None, None, :]
    at = rows_at[:, None, None] + (spans // FORMAT.num_spans * FORMAT.num_bytes)[None, None, :]
    scales, minima = _scales(byte_ptr, half_ptr, at, within, mask, FORMAT)
    values = _codes(byte_ptr, at, within, mask, FORMAT) * scales[:, :, :, None]
    if FORMAT.has_minima:
        values -= minima[:, :, :, None]
    values = tl.reshape(values, (inside.shape[0], BLOCK_IN)).to(like_ptr.dtype.element_ty)
    return tl.trans(values)
