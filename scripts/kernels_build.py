"""Sources and compiler flags of the CPU kernels' library: what setup.py and the other scripts compile. No imports.

`level_NAME.cpp` and `level_NAME_*.cpp` are compiled for the instruction set NAME; all others for any processor.
"""

FLAGS = ("-O3", "-g0", "-std=c++17", "-fPIC", "-Wno-psabi", "-Wno-uninitialized", "-fno-math-errno", "-pthread")
# Instruction sets besides the portable one. Without those that a compiler does not know the library does with less.
LEVELS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512bf16", "-mavx512vnni", "-mfma",
        "-mf16c",
    ),
}  # fmt: skip
# Their vectors are longer than the registers, and with more optimisation GCC 12 compiles them twice as long.
SIMPLY = ("level_portable", "level_portable_quantise")


def level_of(stem: str) -> str | None:
    """The instruction set of a source; None for one that is compiled for any processor and calls the levels."""
    return stem.split("_")[1] if stem.startswith("level_") else None


def flags_of(stem: str) -> list[str]:
    """The flags of one source but for its includes and defines."""
    flags = [*FLAGS, *LEVELS.get(level_of(stem) or "", ())]
    if stem in SIMPLY:
        flags[flags.index("-O3")] = "-O1"
    if stem.endswith("_quantise"):  # as PyTorch computes: no product is fused with a sum
        flags.append("-ffp-contract=off")
    return flags


# The sources that compile longest, first: one that is begun last is waited for.
_LONGEST = ("level_avx512", "level_portable", "level_avx512_floats", "level_avx2", "level_avx2_int16")


def compile_order(stems: list[str]) -> list[str]:
    """All of `stems`, the longest to compile first."""
    return sorted(stems, key=lambda stem: (_LONGEST.index(stem) if stem in _LONGEST else len(_LONGEST), stem))
