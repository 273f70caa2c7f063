"""A program that is being written: its steps, the weights they read, and the rows between them."""

from __future__ import annotations

from typing import Any

import torch

from offmoe.decode.spec import DecoderSpec
from offmoe.decode.weights import WeightReader
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.program import CpuProgram


class Steps:
    """One program and the rows that are read within a layer alone: all layers share them."""

    def __init__(self, kernels: CpuKernels, program: CpuProgram, spec: DecoderSpec, dtype: torch.dtype) -> None:
        self.kernels, self.program, self.spec, self.dtype = kernels, program, spec, dtype
        self.read = WeightReader(kernels, spec, dtype)
        self._rows: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}

    def row(self, name: str, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The shared row of that name and width."""
        key = (name, width, dtype or self.dtype)
        if key not in self._rows:
            self._rows[key] = self.program.row(width, key[2])
        return self._rows[key]

    def projected(self, module: Any, name: str, x: torch.Tensor) -> torch.Tensor:
        """Append a linear; the row of its name that it writes. Raises NoSpecError."""
        linear = self.read.linear(module, name)
        row = self.row(name, linear.num_outputs)
        self.program.linear(linear, x, row)
        return row

    def normed(self, module: Any, name: str, x: torch.Tensor, to: torch.Tensor | None = None) -> torch.Tensor:
        """Append a norm; the row that it writes: `to`, or one of its name. Raises NoSpecError."""
        row = self.row(name, x.numel()) if to is None else to
        self.program.norm(self.read.norm(module, name, width=x.numel()), x, row)
        return row
