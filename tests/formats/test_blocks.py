"""GGUF blocks: the values are those of the gguf package, for every byte that a file may hold."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch

from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantFormat, QuantKind
from offmoe.formats.blocks import block_values
from offmoe.formats.quantised import QuantMatrix

KINDS = list(BLOCK_KINDS)


def random_blocks(kind: QuantKind, num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    """Any bytes: every code, scale and sign occurs, and float16 scales that are no numbers are made finite."""
    block = BLOCK_KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_columns // block.num_columns, block.num_bytes)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    halves = {
        "q2_k": (80, 82),
        "q3_k": (108,),
        "q6_k": (208,),
        "mxfp4_gguf": (),
        "tq1_0": (52,),
        "tq2_0": (64,),
        "iq1_m": (54,),
    }.get(kind, (0, 2))
    if kind in ("q4_0", "q5_0", "q8_0"):
        halves = (0,)
    for at in halves:  # the upper byte of a float16: its exponent is not all ones
        codes[:, :, at + 1] &= 0xBB
    return codes.view(num_rows, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_gguf_package(kind: QuantKind) -> None:
    type_: Any = gguf.GGMLQuantizationType(BLOCK_KINDS[kind].type_number)
    assert gguf.GGML_QUANT_SIZES[type_] == (BLOCK_KINDS[kind].num_columns, BLOCK_KINDS[kind].num_bytes)
    codes = random_blocks(kind, 64, 1024)
    if kind == "mxfp4_gguf":
        codes.view(-1, 17)[:256, 0] = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    with np.errstate(over="ignore"):  # the largest exponents
        expected = gguf.quants.dequantize(codes.numpy(), type_)
    assert np.array_equal(block_values(kind, codes).numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_gives_the_values_of_some_rows(kind: QuantKind) -> None:
    codes = random_blocks(kind, 12, 512)
    matrix = QuantMatrix(QuantFormat(kind=kind, group=BLOCK_KINDS[kind].num_columns), (12, 512), codes, None, None)
    everything = matrix.dequantise(torch.float32)
    assert torch.equal(everything, block_values(kind, codes))
    assert torch.equal(matrix.dequantise(torch.bfloat16, slice(3, 7)), everything[3:7].bfloat16())
