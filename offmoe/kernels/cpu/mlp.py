"""A resident MLP (gate, up, activation, down) of a few rows by the library, as an expert that every row chose."""

from __future__ import annotations

import ctypes

import torch

from offmoe.formats.dense import ExpertWeights
from offmoe.kernels.cpu import structs
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.reference import ExpertMath


class CpuMlp:
    """down(activate(up(x))) of up to `max_rows` rows. Serves one thread at a time."""

    def __init__(self, kernels: CpuKernels, math: ExpertMath, weights: ExpertWeights, *, max_rows: int) -> None:
        """`math` has the biases of one expert; `kernels.supports(math, weights)` is None."""
        self._kernels, self._dtype, self._max_rows = kernels, math.dtype, max_rows
        self._layer = layer = kernels.layer(math, weights)
        self._keep = (math, weights)
        self._address = (ctypes.c_void_p * 1)(layer.expert_address(0, weights))
        self._begin, self._one_row = (ctypes.c_int32 * 2)(), (ctypes.c_int32 * 2)(0, 1)
        self._rows = (ctypes.c_int32 * max_rows)(*range(max_rows))
        row_bytes, rows = layer.width * math.dtype.itemsize, ctypes.addressof(self._rows)
        self._call = structs.CCall(
            activation=ctypes.addressof(layer.activation), experts=ctypes.addressof(self._address),
            begin=ctypes.addressof(self._begin), token=rows, choice=rows, x_row_bytes=row_bytes, y_row_bytes=row_bytes,
            num_experts=1, type=structs.TYPES[math.dtype], x_type=structs.TYPES[math.dtype], width=layer.width,
            hidden=layer.hidden,
        )  # fmt: skip

    def call_between(self, x_1D: torch.Tensor, y_1D: torch.Tensor) -> structs.CCall:
        """A call that always reads and writes these rows. Keep this object."""
        assert self.takes(x_1D) and self.takes(y_1D) and len(x_1D) == 1, f"{x_1D.shape=} {y_1D.shape=}"
        call = structs.CCall.from_buffer_copy(self._call)
        call.x, call.y, call.begin, call.num_tokens = (
            x_1D.data_ptr(), y_1D.data_ptr(), ctypes.addressof(self._one_row), 1
        )  # fmt: skip
        return call

    def takes(self, x: torch.Tensor) -> bool:
        """Contiguous rows of its type and width, and not too many."""
        width = self._layer.width
        few = 0 < x.numel() <= self._max_rows * width
        return few and x.dtype == self._dtype and x.shape[-1] == width and x.is_contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP's output, of x's shape. `takes` said True. Raises MemoryError."""
        y, call = torch.empty_like(x), self._call
        call.x, call.y = x.data_ptr(), y.data_ptr()
        call.num_tokens = self._begin[1] = x.numel() // self._layer.width
        self._kernels.run_experts(ctypes.addressof(call))
        return y
