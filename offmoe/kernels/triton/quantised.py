"""Quantised weights inside the Triton kernels: words of codes to values, scales and zero points beside them.

`FORMAT` is a `codes.Codes`. Codes become float32 without a conversion instruction, most without a shift: the bits of
an integer, masked where they are, are a subnormal number, q * 2^(place - 149), which multiplies at full speed; those of
e2m1 and e4m3 are put where float32 has sign, exponent and mantissa, which divides by 2^126 or 2^120. What they are
multiplied with is enlarged to match (`_factors`), so that nothing leaves what float32 holds; inputs are below 2^51.
(NaN of e4m3 is read as 480: weights have none.) Words of a span, 16 bytes, lie in one lane, so that its 16 or 32
products are summed there and multiplied by the scale once.

Shapes: O outputs, K rows of inputs, W words of a row, S = W / 4 spans.
"""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.triton.blocks import output_places


@triton.jit
def _value(words, NUMBER: tl.constexpr, FORMAT: tl.constexpr):
    """Code NUMBER of every word, as float32, too small by what `_factors` makes up for."""
    if FORMAT.is_integer:
        if FORMAT.num_in_place > NUMBER:
            words = words & (((1 << FORMAT.bits) - 1) << (NUMBER * FORMAT.bits))
        else:
            words = (words >> FORMAT.shift) & (((1 << FORMAT.bits) - 1) << (NUMBER * FORMAT.bits - FORMAT.shift))
    elif FORMAT.bits == 4:  # the shift to the right copies the sign, which the mask cuts off but for one bit
        words = ((words << (28 - 4 * NUMBER)) >> 6) & -0x7E400000
    else:
        words = ((words << (24 - 8 * NUMBER)) >> 4) & -0x78100000
    return words.to(tl.float32, bitcast=True)


@triton.jit
def _factors(COUNT: tl.constexpr, FORMAT: tl.constexpr):
    """Factors of the values of COUNT columns, or of their inputs. `_rest` of it is left over."""
    if FORMAT.is_integer:  # 2^(76 - place)
        number = tl.arange(0, COUNT) % (32 // FORMAT.bits)
        place = number * FORMAT.bits - tl.where(number < FORMAT.num_in_place, 0, FORMAT.shift)
        factors = ((203 - place) << 23).to(tl.float32, bitcast=True)
    else:
        factors = tl.full((COUNT,), 2.0**64, tl.float32)
    return factors


@triton.jit
def _rest(FORMAT: tl.constexpr):
    """The power of two by which products are still too small."""
    return 2.0**73 if FORMAT.is_integer else (2.0**62 if FORMAT.bits == 4 else 2.0**56)


@triton.jit
def _values(words, FORMAT: tl.constexpr):
    """(O, K, W) words -> (O, K, S, columns of a span) float32, too small by what `_factors` makes up for."""
    if FORMAT.is_signed:
        words = words ^ -0x7F7F7F80  # the top bit of every byte: 128 added
    if FORMAT.bits == 4:
        even = tl.join(
            tl.join(_value(words, 0, FORMAT), _value(words, 4, FORMAT)),
            tl.join(_value(words, 2, FORMAT), _value(words, 6, FORMAT)),
        )
        odd = tl.join(
            tl.join(_value(words, 1, FORMAT), _value(words, 5, FORMAT)),
            tl.join(_value(words, 3, FORMAT), _value(words, 7, FORMAT)),
        )
    else:
        even = tl.join(_value(words, 0, FORMAT), _value(words, 2, FORMAT))
        odd = tl.join(_value(words, 1, FORMAT), _value(words, 3, FORMAT))
    values = tl.join(even, odd)
    return tl.reshape(values, (words.shape[0], words.shape[1], words.shape[2] // 4, 128 // FORMAT.bits))


@triton.jit
def _scales(scale_ptr, slot, rows, halves, columns, mask, SLOT: tl.constexpr, FORMAT: tl.constexpr):
    """(O, K, S) float32: every span's scale times `_rest`, 0 outside."""
    at = scale_ptr + slot[None, :, None] * (SLOT * 4 // FORMAT.scale_bytes) + FORMAT.scale_base
    at += (rows // FORMAT.group_rows * FORMAT.scale_out_stride + halves * FORMAT.scale_pair)[:, None, None]
    at += (columns // FORMAT.group * FORMAT.scale_in_stride)[None, None, :]
    if FORMAT.is_exponent:  # 2^(s - 127); at 0 that is subnormal
        exponent = tl.load(at, mask=mask, other=0).to(tl.int32)
        scales = tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
    else:
        scales = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return scales * _rest(FORMAT)


@triton.jit
def _zeros(zero_ptr, slot, rows, halves, columns, mask, SLOT: tl.constexpr, FORMAT: tl.constexpr):
    """(O, K, S) or (1, 1, 1) float32: what must be taken from integers, as much too small as they."""
    if FORMAT.zero_rows == 0:
        zeros = tl.full((1, 1, 1), 8.0 if FORMAT.bits == 4 else 128.0, tl.float32)
    else:
        at = zero_ptr + slot[None, :, None] * (SLOT * 4 // FORMAT.zero_bytes) + FORMAT.zero_base
        at += (rows // FORMAT.zero_rows * FORMAT.zero_out_stride + halves * FORMAT.zero_pair)[:, None, None]
        at += (columns // FORMAT.group * FORMAT.zero_in_stride)[None, None, :]
        words = tl.load(at, mask=mask, other=0).to(tl.int32)
        if FORMAT.zero_rows > 1:  # packed down the rows
            shifts = (rows % FORMAT.zero_rows * FORMAT.bits).to(tl.int32)
            words = (words >> shifts[:, None, None]) & ((1 << FORMAT.bits) - 1)
        if FORMAT.is_signed:
            words += 128
        zeros = words.to(tl.float32)
    return zeros * 2.0**-73


@triton.jit
def row_products(
    in_ptr, in_rows, ready, word_ptr, scale_ptr, zero_ptr, slot, block, inside,
    NUM_IN: tl.constexpr, SLOT: tl.constexpr, BASE: tl.constexpr, OUT_STRIDE: tl.constexpr, PAIRS: tl.constexpr,
    PAIR_STRIDE: tl.constexpr, FORMAT: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """(O, K) float32: row k of the inputs with the outputs of its slot, 0 where `ready` is false."""
    PER_WORD: tl.constexpr = 32 // FORMAT.bits
    WORDS: tl.constexpr = BLOCK_IN // PER_WORD
    SPANS: tl.constexpr = WORDS // 4
    K: tl.constexpr = in_rows.shape[0]
    rows = output_places(block, 1, FORMAT.pair_rows, PAIRS, BLOCK_OUT)
    halves = output_places(block, 0, 1 if PAIRS == 1 else 0, PAIRS, BLOCK_OUT)
    words_at = word_ptr + slot[None, :, None] * SLOT + BASE
    words_at += output_places(block, OUT_STRIDE, PAIR_STRIDE, PAIRS, BLOCK_OUT)[:, None, None]
    factors = _factors(4 * PER_WORD, FORMAT)[None, None, None, :]
    used = inside[:, None, None] & ready[None, :, None]
    sums = tl.zeros((inside.shape[0], K, SPANS), tl.float32)
    for begin in tl.range(0, NUM_IN, BLOCK_IN, num_stages=STAGES):
        spans = begin + tl.arange(0, SPANS) * (4 * PER_WORD)
        mask = used & (spans < NUM_IN)[None, None, :]
        scales = _scales(scale_ptr, slot, rows, halves, spans, mask, SLOT, FORMAT)
        inputs = begin + tl.arange(0, BLOCK_IN)
        in_mask = ready[:, None] & (inputs[None, :] < NUM_IN)
        x = tl.load(in_ptr + in_rows[:, None] * NUM_IN + inputs[None, :], mask=in_mask, other=0.0).to(tl.float32)
        numbers = begin // PER_WORD + tl.arange(0, WORDS)
        words = tl.load(
            words_at + numbers[None, None, :], mask=used & (numbers < NUM_IN // PER_WORD)[None, None, :], other=0
        )
        x = tl.reshape(x, (1, K, SPANS, 4 * PER_WORD))
        products = tl.sum(_values(words, FORMAT) * (x * factors), axis=3)
        if FORMAT.is_integer:
            products -= _zeros(zero_ptr, slot, rows, halves, spans, mask, SLOT, FORMAT) * tl.sum(x, axis=3)
        sums += products * scales
    return tl.sum(sums, axis=2)


@triton.jit
def weight_block(
    word_ptr, scale_ptr, zero_ptr, slot, block, inside, begin, like_ptr,
    NUM_IN: tl.constexpr, SLOT: tl.constexpr, BASE: tl.constexpr, OUT_STRIDE: tl.constexpr, PAIRS: tl.constexpr,
    PAIR_STRIDE: tl.constexpr, FORMAT: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """(BLOCK_IN, O): the values from column `begin` on, computed in float32, rounded to the type of `like_ptr`."""
    PER_WORD: tl.constexpr = 32 // FORMAT.bits
    SPANS: tl.constexpr = BLOCK_IN // PER_WORD // 4
    rows = output_places(block, 1, FORMAT.pair_rows, PAIRS, BLOCK_OUT)
    halves = output_places(block, 0, 1 if PAIRS == 1 else 0, PAIRS, BLOCK_OUT)
    slots = tl.full((1,), 0, tl.int64) + slot
    numbers = begin // PER_WORD + tl.arange(0, BLOCK_IN // PER_WORD)
    words_at = word_ptr + slot * SLOT + BASE
    words_at += output_places(block, OUT_STRIDE, PAIR_STRIDE, PAIRS, BLOCK_OUT)[:, None, None] + numbers[None, None, :]
    mask = inside[:, None, None] & (numbers < NUM_IN // PER_WORD)[None, None, :]
    words = tl.load(words_at, mask=mask, other=0)  # of three dimensions at once, so that a span stays in its lane
    spans = begin + tl.arange(0, SPANS) * (4 * PER_WORD)
    span_mask = inside[:, None, None] & (spans < NUM_IN)[None, None, :]
    values = _values(words, FORMAT) * _factors(4 * PER_WORD, FORMAT)[None, None, None, :]
    if FORMAT.is_integer:
        values -= _zeros(zero_ptr, slots, rows, halves, spans, span_mask, SLOT, FORMAT)[:, :, :, None]
    values *= _scales(scale_ptr, slots, rows, halves, spans, span_mask, SLOT, FORMAT)[:, :, :, None]
    values = tl.reshape(values, (inside.shape[0], BLOCK_IN)).to(like_ptr.dtype.element_ty)
    return tl.trans(values)
