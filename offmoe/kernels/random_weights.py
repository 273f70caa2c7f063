"""Weights made up in place, plain or quantised: outputs are then about as large as the inputs."""

from __future__ import annotations

import math

import torch

from offmoe.formats.quantised import QuantMatrix

# The root mean square of values whose codes are as likely each.
_SPREAD = {"int4": 4.6, "int8": 74.0, "mxfp4": 2.9, "fp8": 130.0}


def fill_at_random(part: torch.Tensor | QuantMatrix, num_in: int, generator: torch.Generator) -> None:
    """Fill a matrix of `num_in` inputs where it lies; no copy is made, for which there may be no room any more."""
    if isinstance(part, torch.Tensor):
        part.normal_(std=num_in**-0.5, generator=generator)
        return
    _fill_codes(part.codes, generator)
    if part.zeros is not None:
        _fill_codes(part.zeros, generator)
    assert part.scales is not None, f"{part.format=}"
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
