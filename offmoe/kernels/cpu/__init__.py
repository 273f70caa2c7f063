from offmoe.kernels.cpu.kernels import CpuKernels, CpuLayer, ExpertRows
from offmoe.kernels.cpu.loader import LEVELS, load_cpu_kernels, usable_levels
from offmoe.kernels.cpu.matrices import CpuMatrix, describe, unreadable

__all__ = [
    "LEVELS",
    "CpuKernels",
    "CpuLayer",
    "CpuMatrix",
    "ExpertRows",
    "describe",
    "load_cpu_kernels",
    "unreadable",
    "usable_levels",
]
