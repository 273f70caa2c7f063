"""Tensors of a checkpoint as torch tensors: as they are stored, or as values."""

from __future__ import annotations

import math

import torch

from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.quantised import QuantEntry
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.core.errors import CheckpointError, UnsupportedModelError
from offmoe.formats.dense import TORCH_DTYPES, writable_bytes
from offmoe.formats.quantised import QuantMatrix
from offmoe.tiers.huge_pages import in_huge_pages

_DTYPES = TORCH_DTYPES | {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def read_tensor(index: CheckpointIndex, entry: TensorEntry) -> torch.Tensor:
    """A tensor as it is stored. Raises CheckpointError for a type that is not known."""
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(f"tensor {entry.name!r} is stored as {entry.dtype}; known: {', '.join(_DTYPES)}")
    raw = torch.empty(math.prod(entry.shape), dtype=dtype)
    if entry.num_bytes:
        index.read_bytes_into(entry, writable_bytes(raw))
    return raw.view(entry.shape)


def read_matrix(index: CheckpointIndex, entry: QuantEntry) -> QuantMatrix:
    """A quantised matrix as it is stored. Raises UnsupportedModelError for stacked ones."""
    if len(entry.shape) != 2:
        raise UnsupportedModelError(
            f"{entry.name!r} is quantised ({entry.dtype}) and has shape {list(entry.shape)}; stacked matrices are "
            "read for routed experts only"
        )
    codes, scales, zeros = (
        None if stored is None else in_huge_pages(read_tensor(index, stored))
        for stored in (entry.codes, entry.scales, entry.zeros)
    )
    assert codes is not None, f"{entry=}"
    return QuantMatrix(entry.format, (entry.shape[0], entry.shape[1]), codes.flatten(1), scales, zeros)


def values_of(matrix: QuantMatrix, dtype: torch.dtype) -> torch.Tensor:
    """All values, (N, K); what is needed on the way is bounded."""
    values = torch.empty(matrix.shape, dtype=dtype)
    for rows in matrix.row_blocks():
        values[rows] = matrix.dequantise(dtype, rows)
    return values
