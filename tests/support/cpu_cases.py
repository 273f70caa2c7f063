"""What tests of the CPU kernels share."""

from __future__ import annotations

import pytest
import torch

from offmoe.kernels.cpu.decode import CpuLinear
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.loader import load_cpu_kernels, usable_levels
from offmoe.kernels.cpu.matrices import Weight

LEVELS = usable_levels()
needs_library = pytest.mark.skipif(not LEVELS, reason="the CPU kernels were not built")


def open_kernels(level: str = "auto", *, threads: int = 2) -> CpuKernels:
    opened, note = load_cpu_kernels(level, threads=threads)
    assert opened is not None, note
    return opened


def linear(
    kernels: CpuKernels, x_TK: torch.Tensor, weight_NK: Weight, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight.T + bias."""
    return CpuLinear(kernels, weight_NK, bias_N, dtype=x_TK.dtype)(x_TK.contiguous())
