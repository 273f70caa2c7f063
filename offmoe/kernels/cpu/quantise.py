"""Codes and scales by the library, on all cores: the same numbers as `formats.encode`, to the bit.

They are those that PyTorch computes on a processor with AVX2, which adds in an order of its own. On others PyTorch adds
in another order, and where two scales leave nearly the same error the library may take the other one.
"""

from __future__ import annotations

import ctypes

import torch

from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.core.errors import CheckpointError
from offmoe.formats import encode as reference
from offmoe.formats.dense import TORCH_DTYPES
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu import structs
from offmoe.kernels.cpu.kernels import CpuKernels

GROUPS = (32, 64, 128)


def encode_by_library(
    kernels: CpuKernels | None, values_NK: torch.Tensor, form: QuantFormat, *, name: str
) -> QuantMatrix:
    """`formats.encode.encode` with `kernels`; with PyTorch where there are none, or for other groups."""
    if kernels is None or form.group not in GROUPS:
        return reference.encode_matrix(values_NK, form, name=name)
    num_rows, width = values_NK.shape
    assert width % form.group == 0, f"{width=} {form=}"
    values_NK = values_NK.contiguous() if values_NK.dtype in structs.TYPES else values_NK.float().contiguous()
    bits = reference.BITS[form.kind]
    scales_NG = torch.empty(num_rows, width // form.group, dtype=TORCH_DTYPES[form.scale_dtype])
    codes = torch.empty(num_rows, width * bits // 32, dtype=torch.int32)
    divisors = reference.DIVISORS[form.kind]
    call = structs.CEncode(
        values=values_NK.data_ptr(), codes=codes.data_ptr(), scales=scales_NG.data_ptr(),
        divisors=ctypes.addressof(array := (ctypes.c_float * len(divisors))(*divisors)), num_groups=scales_NG.numel(),
        num_divisors=len(array), group=form.group, bits_a_code=bits, offset=form.offset,
        value_type=structs.TYPES[values_NK.dtype], scale_type=structs.SCALE_TYPES[form.scale_dtype],
    )  # fmt: skip
    kernels.run_encode(ctypes.addressof(call))
    if not call.is_finite:
        raise CheckpointError(reference.not_finite(name))
    return QuantMatrix(form, (num_rows, width), codes, scales_NG, None)
