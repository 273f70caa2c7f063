"""Weights as the library reads them: addresses and strides, made once and kept as long as the memory stays put."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu import structs

Weight = torch.Tensor | QuantMatrix

# Scales are looked up once for this many columns.
GROUP_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class CpuMatrix:
    """One matrix, (N, K). `weight` keeps its memory alive; what a slot holds may change under it, where it lies not."""

    struct: structs.CMatrix
    weight: Weight


def knows(form: QuantFormat) -> bool:
    """True when the library multiplies with codes of this kind."""
    return form.kind in structs.QUANT_KINDS


def unreadable(weight: Weight, dtype: torch.dtype) -> str | None:
    """Why the library cannot multiply `weight` in `dtype` as the reference does, or None."""
    if dtype not in structs.TYPES:
        return f"the CPU kernels do not compute in {dtype}"
    if isinstance(weight, QuantMatrix):
        return _unreadable_codes(weight)
    if weight.device.type != "cpu" or weight.dtype not in structs.DENSE_KINDS:
        return f"a matrix is {weight.dtype} on {weight.device}"
    # The library adds up in float32 and rounds no weight. Torch rounds float16 weights to bfloat16 first, which changes
    # none that was bfloat16 when its file was made.
    if dtype not in (weight.dtype, torch.float32) and (weight.dtype, dtype) != (torch.float16, torch.bfloat16):
        return f"{weight.dtype} weights are rounded to {dtype} by torch before they are used"
    if weight.dim() != 2 or 1 not in weight.stride() or min(weight.shape) < 1:
        return f"a matrix of shape {tuple(weight.shape)} has strides {weight.stride()}, neither of them 1"
    return None


def describe(weight: Weight, *, transposed: bool = False) -> CpuMatrix:
    """`weight`, for which `unreadable` is None. `transposed`: a plain tensor is (K, N) rather than (N, K)."""
    if isinstance(weight, QuantMatrix):
        return CpuMatrix(_codes(weight), weight)
    matrix = weight.t() if transposed else weight
    num_rows, num_columns = matrix.shape
    along_rows = matrix.stride(1) != 1 and num_columns > 1
    struct = structs.CMatrix(
        codes=matrix.data_ptr(),
        rows=num_rows,
        columns=num_columns,
        row_bytes=matrix.stride(1 if along_rows else 0) * matrix.element_size(),
        kind=structs.DENSE_KINDS[matrix.dtype],
        group=num_columns,
        group_rows=1,
        transposed=int(along_rows),
    )
    return CpuMatrix(struct, weight)


def _unreadable_codes(weight: QuantMatrix) -> str | None:
    if not knows(weight.format):
        return f"the CPU kernels do not read {weight.format.name}"
    group, num_columns = weight.format.group, weight.shape[1]
    if group % GROUP_COLUMNS and group < num_columns:
        return f"groups of {group} columns are no multiple of {GROUP_COLUMNS}"
    for tensor in (weight.codes, weight.scales, weight.zeros):
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"a matrix is on {tensor.device}"
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            return f"columns of quantised weights have stride {tensor.stride(1)}, not 1"
    return None


def _codes(weight: QuantMatrix) -> structs.CMatrix:
    form, scales, zeros = weight.format, weight.scales, weight.zeros
    assert form.is_blocks or scales is not None, f"{form=}"
    return structs.CMatrix(
        codes=weight.codes.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        zeros=None if zeros is None else zeros.data_ptr(),
        rows=weight.shape[0],
        columns=weight.shape[1],
        row_bytes=_row_bytes(weight.codes),
        scale_row_bytes=0 if scales is None else _row_bytes(scales),
        zero_row_bytes=0 if zeros is None else _row_bytes(zeros),
        kind=structs.QUANT_KINDS[form.kind],
        scale_type=structs.SCALE_TYPES[form.scale_dtype],
        group=form.group,
        group_rows=form.group_rows,
        zero=form.offset,
        code_signed=int(weight.codes.dtype == torch.int8),
        zeros_packed=int(zeros is not None and zeros.dtype == torch.int32),
    )


def _row_bytes(tensor: torch.Tensor) -> int:
    return tensor.stride(0) * tensor.element_size()
