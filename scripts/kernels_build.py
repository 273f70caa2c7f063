"""Sources and compiler flags of the CPU kernels' library, for setup.py and the scripts that compile it.

Sources are found by folder: those in `isa/NAME` are compiled for the instruction set NAME, the rest for any processor.
"""

from __future__ import annotations

import platform
from pathlib import Path

FOLDER = "offmoe/kernels/cpu/src"  # includes are written relative to it
SOURCES = Path(__file__).parents[1] / FOLDER
# The source that says which instruction sets there are: compiled with -DOFFMOE_HAS_NAME for each.
FACE = "ops/library.cpp"
FLAGS = ("-O3", "-g0", "-std=c++17", "-fPIC", "-Wno-psabi", "-Wno-uninitialized", "-fno-math-errno", "-pthread")
# Instruction sets besides the portable one. Without those that a compiler does not know the library does with less.
ISAS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512bf16", "-mavx512vnni", "-mfma",
        "-mf16c",
    ),
    "neon": (),  # part of every aarch64
    "neon_dot": ("-march=armv8.2-a+dotprod",),
}  # fmt: skip
_OF_PROCESSORS = {"x86_64": ("avx2", "avx512"), "aarch64": ("neon", "neon_dot")}
_OF_FLAGS = {"-march=armv8.2-a+dotprod": "asimddp"}  # the system's name, where it is not the compiler's
_OTHER_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


def isas_of(processor: str) -> list[str]:
    """The instruction sets of a kind of processor, as systems and compilers name it."""
    name = processor.lower()
    return list(_OF_PROCESSORS.get(_OTHER_NAMES.get(name, name), ()))


def native_isas() -> list[str]:
    """Instruction sets of this processor; all of its kind where the system does not say."""
    isas, cpu_info = isas_of(platform.machine()), Path("/proc/cpuinfo")
    if not cpu_info.exists():
        return isas
    has = set(cpu_info.read_text(encoding="utf-8").replace("_", "").split())
    return [isa for isa in isas if has >= {_OF_FLAGS.get(flag, flag[2:]) for flag in ISAS[isa]}]


def sources_of(*isas: str) -> list[str]:
    """Sources for any processor, for the portable instruction set and for `isas`; the longest to compile first."""
    names = (path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.cpp"))
    return compile_order([name for name in names if isa_of(name) in (None, "portable", *isas)])


def isa_of(source: str) -> str | None:
    """The instruction set of a source; None for one that is compiled for any processor and calls all of them."""
    room, *folders = source.split("/")
    return folders[0] if room == "isa" else None


def object_of(source: str) -> str:
    """A file name for the object of a source, which no other has."""
    return source.removesuffix(".cpp").replace("/", "-") + ".o"


def flags_of(source: str) -> list[str]:
    """The flags of one source but for its includes and defines."""
    flags = [*FLAGS, *ISAS.get(isa_of(source) or "", ())]
    if isa_of(source) and source.endswith("/quantise.cpp"):  # as PyTorch computes: no product is fused with a sum
        flags.append("-ffp-contract=off")
    return flags


def defines_of(isas: list[str]) -> list[str]:
    """The flags that tell FACE which instruction sets are linked."""
    return [f"-DOFFMOE_HAS_{isa.upper()}" for isa in isas]


# The sources that compile longest, first: one that is begun last is waited for.
_LONGEST = (
    "isa/avx512/avx512.cpp",
    "isa/portable/portable.cpp",
    "isa/neon/neon.cpp",
    "isa/neon_dot/neon_dot.cpp",
    "isa/avx512/floats.cpp",
    "isa/avx2/avx2.cpp",
    "isa/avx2/int16.cpp",
)


def compile_order(sources: list[str]) -> list[str]:
    """All of `sources`, the longest to compile first."""
    return sorted(sources, key=lambda name: (_LONGEST.index(name) if name in _LONGEST else len(_LONGEST), name))
