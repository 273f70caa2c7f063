"""Triton kernels over a slab of slots: one matrix of every row's expert, addressed by slot number.

A matrix is (outputs x inputs) in elements from a slot's start: BASE + output * OUT_STRIDE + input * IN_STRIDE; so rows,
columns and interleaved rows are one code. All of it is constant for a layer, and loads as wide as the strides allow.
PAIRS says where the two halves of a gated expert lie. 0: there is one. 1: the second begins PAIR_STRIDE further on. 2:
gate and up take turns, PAIR_STRIDE apart. Both halves are then one block of outputs, split after the product.

Products are summed in float32 and rounded to the layer's type wherever torch would write a tensor of that type: after
the product, the bias and the activation. `choose_rows` is for few rows (each reads its weights; neighbours share them
through L2), `tile_rows` for many (rows of one slot share a tile), `weighted_rows` sums a token's rows on the way out.

With FORMAT weights are quantised, the elements are words of codes, and `triton_quantised` makes values of them; of
GGUF's blocks they are bytes, and `triton_gguf` does.

All run on the caller's current stream, in the order in which they are launched. They read slots and never write to
them; the caller keeps the slots from being refilled until they have run.
"""

# The compiler takes plain `if`s: constants are decided at compile time, nested, and not every one is an expression.
# ruff: noqa: SIM102, SIM108

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.triton import gguf as triton_gguf
from offmoe.kernels.triton import quantised as triton_quantised
from offmoe.kernels.triton.blocks import output_places, outputs_inside

NO_ACTIVATION, SILU, GELU, GELU_TANH, RELU, RELU_SQUARED = range(6)


@triton.jit
def _rounded(value, like_ptr):
    return value.to(like_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _activated(x, ALPHA: tl.constexpr, KIND: tl.constexpr):
    if KIND == 1:
        x = x * tl.sigmoid(x * ALPHA)
    elif KIND == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 3:  # 0.5 x (1 + tanh(u)) is x sigmoid(2u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == 4:
        x = tl.maximum(x, 0.0)
    elif KIND == 5:
        x = tl.maximum(x, 0.0)
        x = x * x
    return x


@triton.jit
def _finished(
    sums, bias, out_ptr, PAIRS: tl.constexpr, BLOCK_OUT: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr,
    ALPHA: tl.constexpr, GATE_LIMIT: tl.constexpr, UP_LIMIT: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """(M, outputs) sums, bias and activation applied: (M, BLOCK_OUT). A limit below zero is none."""
    value = _rounded(sums, out_ptr)
    if HAS_BIAS:
        value = _rounded(value + bias, out_ptr)
    if PAIRS == 0:
        value = _activated(value, ALPHA, KIND)
    else:
        if PAIRS == 1:
            pairs = tl.permute(tl.reshape(value, (value.shape[0], 2, BLOCK_OUT)), (0, 2, 1))
        else:
            pairs = tl.reshape(value, (value.shape[0], BLOCK_OUT, 2))
        gate, up = tl.split(pairs)
        if UP_LIMIT >= 0:
            up = tl.minimum(tl.maximum(up, -UP_LIMIT), UP_LIMIT)
        if GATE_LIMIT >= 0:
            gate = tl.minimum(gate, GATE_LIMIT)
        value = _rounded(_activated(gate, ALPHA, KIND), out_ptr) * _rounded(up + OFFSET, out_ptr)
    return value


@triton.jit
def _expert_and_slot(rows, valid, expert_ptr, slot_ptr, NUM_EXPERTS: tl.constexpr):
    """Each row's expert and slot, -1 where there is none; with NUM_EXPERTS, `slot_ptr` is a table by expert."""
    expert = tl.load(expert_ptr + rows, mask=valid, other=-1).to(tl.int64)
    if NUM_EXPERTS > 0:
        known = (expert >= 0) & (expert < NUM_EXPERTS)
        slot = tl.load(slot_ptr + expert, mask=known, other=-1).to(tl.int64)
    else:
        slot = tl.load(slot_ptr + rows, mask=valid, other=-1).to(tl.int64)
    return expert, slot


@triton.jit
def _row_products(
    in_ptr, in_rows, ready, code_ptr, scale_ptr, zero_ptr, slot, block, inside,
    NUM_IN: tl.constexpr, SLOT: tl.constexpr, BASE: tl.constexpr, OUT_STRIDE: tl.constexpr, PAIRS: tl.constexpr,
    PAIR_STRIDE: tl.constexpr, FORMAT: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """(O, K) float32: row k of the inputs with the outputs of its slot."""
    if FORMAT.is_blocks:
        products = triton_gguf.gguf_row_products(
            in_ptr, in_rows, ready, code_ptr, scale_ptr, slot, block, inside, NUM_IN, SLOT, BASE, OUT_STRIDE, PAIRS,
            PAIR_STRIDE, FORMAT, BLOCK_OUT, BLOCK_IN, STAGES,
        )  # fmt: skip
    else:
        products = triton_quantised.row_products(
            in_ptr, in_rows, ready, code_ptr, scale_ptr, zero_ptr, slot, block, inside, NUM_IN, SLOT, BASE, OUT_STRIDE,
            PAIRS, PAIR_STRIDE, FORMAT, BLOCK_OUT, BLOCK_IN, STAGES,
        )  # fmt: skip
    return products


@triton.jit
def _weight_block(
    code_ptr, scale_ptr, zero_ptr, slot, block, inside, begin, like_ptr,
    NUM_IN: tl.constexpr, SLOT: tl.constexpr, BASE: tl.constexpr, OUT_STRIDE: tl.constexpr, PAIRS: tl.constexpr,
    PAIR_STRIDE: tl.constexpr, FORMAT: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """(BLOCK_IN, O): the values from column `begin` on."""
    if FORMAT.is_blocks:
        weights = triton_gguf.gguf_weight_block(
            code_ptr, scale_ptr, slot, block, inside, begin, like_ptr, NUM_IN, SLOT, BASE, OUT_STRIDE, PAIRS,
            PAIR_STRIDE, FORMAT, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
    else:
        weights = triton_quantised.weight_block(
            code_ptr, scale_ptr, zero_ptr, slot, block, inside, begin, like_ptr, NUM_IN, SLOT, BASE, OUT_STRIDE, PAIRS,
            PAIR_STRIDE, FORMAT, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
    return weights


@triton.jit(do_not_specialize_on_alignment=["bias_ptr", "token_ptr", "expert_ptr", "slot_ptr", "missing_ptr"])
def choose_rows(
    in_ptr, slab_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, token_ptr, expert_ptr, slot_ptr, missing_ptr,
    NUM_IN: tl.constexpr, NUM_OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, OUT_BEGIN: tl.constexpr,
    SLOT: tl.constexpr, BASE: tl.constexpr, OUT_STRIDE: tl.constexpr, IN_STRIDE: tl.constexpr, FORMAT: tl.constexpr,
    PAIRS: tl.constexpr, PAIR_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_WIDTH: tl.constexpr,
    BIAS_STRIDE: tl.constexpr, BIAS_PAIR: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr,
    GATE_LIMIT: tl.constexpr, UP_LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    ROWS_A_TOKEN: tl.constexpr, NUM_EXPERTS: tl.constexpr, COUNT_MISSING: tl.constexpr, ZERO_MISSING: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (row, block): outputs of one row. Row r reads input r // ROWS_A_TOKEN, or token_ptr[r] for 0."""
    row, block = tl.program_id(0), tl.program_id(1)
    expert, slot = _expert_and_slot(row, row >= 0, expert_ptr, slot_ptr, NUM_EXPERTS)
    outputs = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_at = out_ptr + row.to(tl.int64) * OUT_WIDTH + OUT_BEGIN + outputs[None, :]
    if slot < 0:
        if ZERO_MISSING:
            zeros = tl.zeros((1, BLOCK_OUT), tl.float32).to(out_ptr.dtype.element_ty)
            tl.store(out_at, zeros, mask=outputs[None, :] < NUM_OUT)
        if COUNT_MISSING:
            if (block == 0) & (expert >= 0) & (expert < NUM_EXPERTS):
                tl.atomic_add(missing_ptr, 1)
        return
    if ROWS_A_TOKEN > 0:
        in_row = (row // ROWS_A_TOKEN).to(tl.int64)
    else:
        in_row = tl.load(token_ptr + row).to(tl.int64)
    inside = outputs_inside(block, NUM_OUT, PAIRS, BLOCK_OUT)
    if FORMAT is None:
        weights_at = (
            slab_ptr + slot * SLOT + BASE + output_places(block, OUT_STRIDE, PAIR_STRIDE, PAIRS, BLOCK_OUT)[:, None]
        )
        sums = tl.zeros((inside.shape[0], BLOCK_IN), tl.float32)
        for begin in tl.range(0, NUM_IN, BLOCK_IN, num_stages=STAGES):
            inputs = begin + tl.arange(0, BLOCK_IN)
            x = tl.load(in_ptr + in_row * NUM_IN + inputs, mask=inputs < NUM_IN, other=0.0).to(tl.float32)
            mask = inside[:, None] & (inputs[None, :] < NUM_IN)
            weights = tl.load(weights_at + inputs[None, :] * IN_STRIDE, mask=mask, other=0.0).to(tl.float32)
            sums += weights * x[None, :]
        totals = tl.sum(sums, axis=1)[None, :]
    else:
        first = tl.zeros((1,), tl.int64)
        totals = _row_products(
            in_ptr, first + in_row, first == 0, slab_ptr, scale_ptr, zero_ptr, first + slot, block, inside, NUM_IN,
            SLOT, BASE, OUT_STRIDE, PAIRS, PAIR_STRIDE, FORMAT, BLOCK_OUT, BLOCK_IN, STAGES,
        ).T  # fmt: skip
    bias = 0.0
    if HAS_BIAS:
        starts = output_places(block, BIAS_STRIDE, BIAS_PAIR, PAIRS, BLOCK_OUT)
        bias_at = bias_ptr + expert * BIAS_WIDTH + OUT_BEGIN + starts
        bias = tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    value = _finished(
        totals, bias, out_ptr, PAIRS, BLOCK_OUT, HAS_BIAS, KIND, ALPHA, GATE_LIMIT, UP_LIMIT,
        OFFSET,
    )  # fmt: skip
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=outputs[None, :] < NUM_OUT)


@triton.jit(do_not_specialize_on_alignment=["bias_ptr", "expert_ptr", "slot_ptr", "weight_ptr"])
def weighted_rows(
    in_ptr, slab_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, expert_ptr, slot_ptr, weight_ptr, round_ptr,
    NUM_IN: tl.constexpr, NUM_OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, OUT_BEGIN: tl.constexpr,
    SLOT: tl.constexpr, BASE: tl.constexpr, OUT_STRIDE: tl.constexpr, IN_STRIDE: tl.constexpr, FORMAT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (token, block): outputs of one token, its TOP_K rows weighted and summed; missing ones are zero."""
    token, block = tl.program_id(0), tl.program_id(1)
    choices = tl.arange(0, BLOCK_K)
    rows = token * TOP_K + choices
    chosen = choices < TOP_K
    expert, slot = _expert_and_slot(rows, chosen, expert_ptr, slot_ptr, NUM_EXPERTS)
    ready = slot >= 0
    outputs = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = outputs < NUM_OUT
    if FORMAT is None:
        weights_at = slab_ptr + slot[:, None, None] * SLOT + BASE + (outputs * OUT_STRIDE)[None, :, None]
        sums = tl.zeros((BLOCK_K, BLOCK_OUT, BLOCK_IN), tl.float32)
        for begin in tl.range(0, NUM_IN, BLOCK_IN, num_stages=STAGES):
            inputs = begin + tl.arange(0, BLOCK_IN)
            in_mask = ready[:, None] & (inputs[None, :] < NUM_IN)
            x = tl.load(in_ptr + rows[:, None] * NUM_IN + inputs[None, :], mask=in_mask, other=0.0).to(tl.float32)
            mask = in_mask[:, None, :] & inside[None, :, None]
            weights = tl.load(weights_at + (inputs * IN_STRIDE)[None, None, :], mask=mask, other=0.0).to(tl.float32)
            sums += weights * x[:, None, :]
        totals = tl.sum(sums, axis=2)
    else:
        totals = _row_products(
            in_ptr, rows, ready, slab_ptr, scale_ptr, zero_ptr, slot, block, inside, NUM_IN, SLOT, BASE, OUT_STRIDE, 0,
            0, FORMAT, BLOCK_OUT, BLOCK_IN, STAGES,
        ).T  # fmt: skip
    value = _rounded(totals, round_ptr)
    if HAS_BIAS:
        bias_at = bias_ptr + expert[:, None] * BIAS_WIDTH + OUT_BEGIN + outputs[None, :]
        bias = tl.load(bias_at, mask=ready[:, None] & inside[None, :], other=0.0).to(tl.float32)
        value = _rounded(value + bias, round_ptr)
    weight = tl.load(weight_ptr + rows, mask=chosen & ready, other=0.0).to(tl.float32)
    total = tl.sum(value * weight[:, None], axis=0)
    out_at = out_ptr + token.to(tl.int64) * OUT_WIDTH + OUT_BEGIN + outputs
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["bias_ptr", "token_ptr", "expert_ptr", "tile_slot_ptr", "tile_row_ptr"])
def tile_rows(
    in_ptr, slab_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, token_ptr, expert_ptr, tile_slot_ptr, tile_row_ptr,
    NUM_IN: tl.constexpr, NUM_OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, OUT_BEGIN: tl.constexpr,
    SLOT: tl.constexpr, BASE: tl.constexpr, OUT_STRIDE: tl.constexpr, IN_STRIDE: tl.constexpr, FORMAT: tl.constexpr,
    PAIRS: tl.constexpr, PAIR_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_WIDTH: tl.constexpr,
    BIAS_STRIDE: tl.constexpr, BIAS_PAIR: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr,
    GATE_LIMIT: tl.constexpr, UP_LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    ROWS_A_TOKEN: tl.constexpr, ZERO_MISSING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, TOGETHER: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """A program is a block of outputs of up to BLOCK_ROWS rows, all of one slot; row -1 is none.

    Programs run through TOGETHER tiles before they go on to the next block of outputs; the tiles are a multiple of it.

    WIDEN is for the interpreter, whose product of bfloat16 matrices takes their bits for integers.
    """
    blocks_together: tl.constexpr = TOGETHER * ((NUM_OUT + BLOCK_OUT - 1) // BLOCK_OUT)
    program = tl.program_id(0)
    tile = program // blocks_together * TOGETHER + program % TOGETHER
    block = program % blocks_together // TOGETHER
    rows = tl.load(tile_row_ptr + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    slot = tl.load(tile_slot_ptr + tile).to(tl.int64)
    used = rows >= 0
    outputs = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_at = out_ptr + rows[:, None] * OUT_WIDTH + OUT_BEGIN + outputs[None, :]
    out_mask = used[:, None] & (outputs[None, :] < NUM_OUT)
    if slot < 0:
        if ZERO_MISSING:
            zeros = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32).to(out_ptr.dtype.element_ty)
            tl.store(out_at, zeros, mask=out_mask)
        return
    if ROWS_A_TOKEN > 0:
        in_rows = rows // ROWS_A_TOKEN
    else:
        in_rows = tl.load(token_ptr + rows, mask=used, other=0).to(tl.int64)
    inside = outputs_inside(block, NUM_OUT, PAIRS, BLOCK_OUT)
    weights_at = (
        slab_ptr + slot * SLOT + BASE + output_places(block, OUT_STRIDE, PAIR_STRIDE, PAIRS, BLOCK_OUT)[None, :]
    )
    sums = tl.zeros((BLOCK_ROWS, inside.shape[0]), tl.float32)
    for begin in range(0, NUM_IN, BLOCK_IN):
        inputs = begin + tl.arange(0, BLOCK_IN)
        x_mask = used[:, None] & (inputs[None, :] < NUM_IN)
        x = tl.load(in_ptr + in_rows[:, None] * NUM_IN + inputs[None, :], mask=x_mask, other=0.0)
        if FORMAT is None:
            mask = (inputs[:, None] < NUM_IN) & inside[None, :]
            weights = tl.load(weights_at + inputs[:, None] * IN_STRIDE, mask=mask, other=0.0)
        else:
            weights = _weight_block(
                slab_ptr, scale_ptr, zero_ptr, slot, block, inside, begin, in_ptr, NUM_IN, SLOT, BASE, OUT_STRIDE,
                PAIRS, PAIR_STRIDE, FORMAT, BLOCK_OUT, BLOCK_IN,
            )  # fmt: skip
        if WIDEN:
            x, weights = x.to(tl.float32), weights.to(tl.float32)
        sums = tl.dot(x, weights, sums, input_precision="ieee")
    bias = 0.0
    if HAS_BIAS:
        expert = tl.load(expert_ptr + tl.max(rows, axis=0)).to(tl.int64)
        starts = output_places(block, BIAS_STRIDE, BIAS_PAIR, PAIRS, BLOCK_OUT)
        bias_at = bias_ptr + expert * BIAS_WIDTH + OUT_BEGIN + starts
        bias = tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    value = _finished(
        sums, bias, out_ptr, PAIRS, BLOCK_OUT, HAS_BIAS, KIND, ALPHA, GATE_LIMIT, UP_LIMIT, OFFSET
    )  # fmt: skip
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=out_mask)
