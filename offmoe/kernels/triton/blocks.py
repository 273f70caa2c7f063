"""Which outputs a program of the Triton kernels computes, and where they lie."""

# Constants are decided at compile time, nested, and not every one is an expression.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def output_places(
    block, OUT_STRIDE: tl.constexpr, PAIR_STRIDE: tl.constexpr, PAIRS: tl.constexpr, BLOCK_OUT: tl.constexpr
):
    """Places of a block's outputs, both halves of it."""
    if PAIRS == 0:
        output_places = (block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)) * OUT_STRIDE
    elif PAIRS == 1:
        number = tl.arange(0, 2 * BLOCK_OUT)
        output_places = (block * BLOCK_OUT + number % BLOCK_OUT) * OUT_STRIDE + (number // BLOCK_OUT) * PAIR_STRIDE
    else:
        output_places = (block * 2 * BLOCK_OUT + tl.arange(0, 2 * BLOCK_OUT)) * PAIR_STRIDE
    return output_places


@triton.jit
def outputs_inside(block, NUM_OUT: tl.constexpr, PAIRS: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """Which outputs of a block exist."""
    if PAIRS == 2:
        inside = output_places(block, 2, 1, PAIRS, BLOCK_OUT) < 2 * NUM_OUT
    else:
        inside = output_places(block, 1, 0, PAIRS, BLOCK_OUT) < NUM_OUT
    return inside
