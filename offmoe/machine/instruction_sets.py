"""The instruction sets of this processor for which the CPU kernels can be compiled, as the system names their parts."""

from __future__ import annotations

import os
from pathlib import Path

# Those with which packed weights were measured to be faster (benchmarks/2026-12-01-packed.md). AVX-512
# has kernels, too, which no processor with its bfloat16 instructions has timed yet.
PACKING_SETS = ("avx2",)
# Best first. Names of the parts are those of /proc/cpuinfo, without underscores.
PARTS = {
    "avx512": frozenset(
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512bf16", "avx512vnni", "fma", "f16c")
    ),
    "avx2": frozenset(("avx2", "fma", "f16c")),
    "neon_dot": frozenset(("asimddp",)),
    "neon": frozenset(("asimd",)),
}


def packs_here() -> bool:
    """Whether the kernels that this processor gets are faster with packed weights, as far as the system says."""
    chosen = os.environ.get("OFFMOE_CPU_KERNELS", "auto")
    return (next(iter(instruction_sets()), "") if chosen == "auto" else chosen) in PACKING_SETS


def instruction_sets(cpu_info: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those that this processor has, best first; none where the system does not say, as macOS and Windows."""
    try:
        has = set(cpu_info.read_text(encoding="utf-8", errors="replace").replace("_", "").split())
    except OSError:
        return []
    return [name for name, parts in PARTS.items() if parts <= has]
