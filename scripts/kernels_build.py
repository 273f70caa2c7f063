"""Sources and compiler flags of the CPU kernels' library, for setup.py and the scripts that compile it.

`level_NAME.cpp` and `level_NAME_*.cpp` are compiled for the instruction set NAME; all others for any processor.
"""

from __future__ import annotations

import platform
from pathlib import Path

FLAGS = ("-O3", "-g0", "-std=c++17", "-fPIC", "-Wno-psabi", "-Wno-uninitialized", "-fno-math-errno", "-pthread")
# Instruction sets besides the portable one. Without those that a compiler does not know the library does with less.
LEVELS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512bf16", "-mavx512vnni", "-mfma",
        "-mf16c",
    ),
}  # fmt: skip


def native_levels() -> list[str]:
    """Instruction sets of this processor; all where the system does not say."""
    cpu_info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    if not cpu_info.exists():
        return list(LEVELS)
    has = set(cpu_info.read_text(encoding="utf-8").replace("_", "").split())
    return [level for level, flags in LEVELS.items() if has >= {flag[2:] for flag in flags}]


def level_of(stem: str) -> str | None:
    """The instruction set of a source; None for one that is compiled for any processor and calls the levels."""
    return stem.split("_")[1] if stem.startswith("level_") else None


def flags_of(stem: str) -> list[str]:
    """The flags of one source but for its includes and defines."""
    flags = [*FLAGS, *LEVELS.get(level_of(stem) or "", ())]
    if stem.endswith("_quantise"):  # as PyTorch computes: no product is fused with a sum
        flags.append("-ffp-contract=off")
    return flags


# The sources that compile longest, first: one that is begun last is waited for.
_LONGEST = ("level_avx512", "level_portable", "level_avx512_floats", "level_avx2", "level_avx2_int16")


def compile_order(stems: list[str]) -> list[str]:
    """All of `stems`, the longest to compile first."""
    return sorted(stems, key=lambda stem: (_LONGEST.index(stem) if stem in _LONGEST else len(_LONGEST), stem))
