"""Bfloat16 rows packed without loss, and unpacked, by the library (formats/packed.py has the form)."""

from __future__ import annotations

import ctypes

import torch

from offmoe.formats.packed_sizes import HEAD_BYTES, PackedPlace, row_bytes
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu import structs
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.matrices import describe


class CpuPacker:
    """Packs rows on the thread that calls, beside whatever else the library does, and unpacks them on all threads."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels

    def pack(self, values: int, begin: int, end: int, place: PackedPlace, slot: int) -> None:
        """Rows [begin, end) of a matrix, side by side from address `values` on, to their place in the slot at `slot`.

        Threads may share a matrix: its counter, which begins with nought, then counts the escapes of all of them.
        """
        num_bytes = row_bytes(place.columns)
        call = structs.CPack(
            values=values, codes=slot + place.codes_at + begin * num_bytes,
            heads=slot + place.heads_at + begin * HEAD_BYTES, escapes=slot + place.escapes_at,
            num_escapes=slot + place.counter_at, rows=end - begin, columns=place.columns, row_bytes=num_bytes,
            most_escapes=place.most_escapes,
        )  # fmt: skip
        self._kernels.run_pack(ctypes.addressof(call))

    def unpack(self, matrix: QuantMatrix, rows: slice) -> torch.Tensor:
        """Rows of a packed matrix as bfloat16, (rows, K)."""
        values = torch.empty(rows.stop - rows.start, matrix.shape[1], dtype=torch.bfloat16)
        described = describe(matrix)
        call = structs.CUnpack(
            matrix=ctypes.addressof(described.struct), to=values.data_ptr(), begin=rows.start, end=rows.stop,
            to_row_bytes=2 * matrix.shape[1],
        )  # fmt: skip
        self._kernels.run_unpack(ctypes.addressof(call))
        return values
