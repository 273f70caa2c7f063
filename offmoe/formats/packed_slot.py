"""Packed matrices in a slot, as views of its bytes. Knows no kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.formats.packed_sizes import ESCAPE_BYTES, HEAD_BYTES, PackedPlace, row_bytes
from offmoe.formats.quantised import QuantMatrix

Unpack = Callable[[QuantMatrix, slice], torch.Tensor]


def packed_format(columns: int) -> QuantFormat:
    """The format of a packed matrix of so many columns."""
    return QuantFormat(kind="packed", group=columns, scale_dtype="U8")


def view_packed(place: PackedPlace, slot: torch.Tensor, unpack: Unpack | None = None) -> QuantMatrix:
    """The matrix at `place` in `slot` (U8), without a copy. `unpack`: kernels that give its values."""
    rows, columns = place.rows, place.columns
    codes = slot.narrow(0, place.codes_at, rows * row_bytes(columns)).view(rows, -1)
    heads = slot.narrow(0, place.heads_at, rows * HEAD_BYTES).view(rows, HEAD_BYTES)
    escapes = slot.narrow(0, place.escapes_at, place.most_escapes * ESCAPE_BYTES).view(torch.int32).view(-1, 1)
    return QuantMatrix(packed_format(columns), (rows, columns), codes, heads, escapes, faster=unpack)


def num_escapes(place: PackedPlace, slot: torch.Tensor) -> int:
    """Escapes of the matrix in `slot`; more than `place.most_escapes` where it did not fit, and means nothing."""
    return int(slot.narrow(0, place.counter_at, 4).view(torch.int32).item()) & 0xFFFFFFFF
