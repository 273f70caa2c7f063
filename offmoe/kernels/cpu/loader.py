"""Finds the library of CPU kernels, asks what it and this processor have, and opens it.

The library is built with the package (setup.py) where there is a compiler. It is no Python module: every call leaves
the interpreter free for other threads.
"""

from __future__ import annotations

import ctypes
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from offmoe.core.errors import UsageError
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.structs import ABI_VERSION, field_places
from offmoe.machine.instruction_sets import instruction_sets
from offmoe.machine.memory import num_cores

LEVELS = ("avx512", "avx2", "neon_dot", "neon", "portable")
CHOICES = ("auto", *LEVELS, "off")
VARIABLE = "OFFMOE_CPU_KERNELS"
# How long a helper looks for the next call before it sleeps: what lies between two tokens. After its first 50 us it
# lets whoever waits for its core run. To wake it costs more than the rest of a call: with 50 us for all, int4 decoding
# of six layers of Qwen3-30B-A3B took 4 to 8% longer (2 cores, in turns).
SPIN_US = 2000
# Of the library: built with the package here, or in a wheel, which serves every Python of a platform.
SUFFIXES = (*EXTENSION_SUFFIXES, ".dylib", ".dll")


def load_cpu_kernels(level: str = "auto", threads: int | None = None) -> tuple[CpuKernels | None, str]:
    """The kernels and a note for the user: why there are none, or what was changed; "" where there is nothing to say.

    `level`: "auto" takes what the environment variable OFFMOE_CPU_KERNELS says, else the best that this processor has.
    `threads`: the caller's included; by default as many as torch has; no more than cores. Raises UsageError for an
    unknown level and for one that is asked for and cannot be had.
    """
    if level == "auto":
        level = os.environ.get(VARIABLE, "auto")
    if level not in CHOICES:
        raise UsageError(f"CPU kernels {level!r} are not known; {VARIABLE} is one of {', '.join(CHOICES)}")
    if level == "off":
        return None, "switched off"
    try:
        library = _library()
    except OSError as error:
        if level != "auto":
            raise UsageError(f"CPU kernels {level!r} cannot be had: {error}") from error
        return None, str(error)
    idx = _level_idx(library, level)
    wanted, cores = threads or torch.get_num_threads(), num_cores()
    notes = [f"{wanted} threads were asked for, this process may use {cores} cores"] if wanted > cores else []
    if level == "auto" and (better := better_level([name for name, _ in _levels(library)])) is not None:
        notes.append(better)
    return CpuKernels(library, _levels(library)[idx][0], idx, min(wanted, cores), SPIN_US), "; ".join(notes)


def better_level(built: list[str]) -> str | None:
    """A sentence where this processor has a better instruction set than the best of those built; else None."""
    has = instruction_sets()
    if not has or has[0] in built:
        return None
    return (
        f"this processor has {has[0]}, the library was built with {', '.join(built)} alone and is slower for it; "
        "install offmoe again on this machine, with a compiler that knows it"
    )


def usable_levels() -> list[str]:
    """Levels that were built and that this processor has, best first; none without the library."""
    try:
        library = _library()
    except OSError:
        return []
    return [name for name, usable in _levels(library) if usable]


def _levels(library: ctypes.CDLL) -> list[tuple[str, bool]]:
    """(name, whether this processor has it), best first."""
    levels: list[tuple[str, bool]] = []
    usable = ctypes.c_int32()
    while (name := library.offmoe_isa(len(levels), ctypes.byref(usable))) is not None:
        levels.append((name.decode(), bool(usable.value)))
    return levels


def _level_idx(library: ctypes.CDLL, level: str) -> int:
    levels = _levels(library)
    for idx, (name, usable) in enumerate(levels):
        if usable and level in ("auto", name):
            return idx
    missing = "this processor does not have it" if level in dict(levels) else "it was not built"
    usable_names = ", ".join(name for name, usable in levels if usable)
    raise UsageError(f"CPU kernels {level!r}: {missing}; set {VARIABLE} to auto or one of: {usable_names}")


def _library() -> ctypes.CDLL:
    """Raises OSError where it was not built, cannot be loaded, is of another version, or has other structs."""
    folder = Path(__file__).parent
    paths = [path for suffix in SUFFIXES if (path := folder / f"_kernels{suffix}").exists()]
    if not paths:
        raise OSError("the CPU kernels were not built; install offmoe with a C++ compiler to have them")
    library = ctypes.CDLL(str(paths[0]))
    version = library.offmoe_abi_version()
    if version != ABI_VERSION:
        raise OSError(f"the CPU kernels are of version {version}, offmoe needs {ABI_VERSION}; install offmoe again")
    check_structs(library)
    library.offmoe_isa.restype = ctypes.c_char_p
    library.offmoe_isa.argtypes = (ctypes.c_int32, ctypes.POINTER(ctypes.c_int32))
    library.offmoe_open.restype = ctypes.c_void_p
    library.offmoe_open.argtypes = (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)
    library.offmoe_close.restype = None
    library.offmoe_close.argtypes = (ctypes.c_void_p,)
    for name in ("encode", "pack", "unpack", "experts", "linear", "norm", "attend", "latent", "layer", "program"):
        getattr(library, f"offmoe_{name}").argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.offmoe_pack.restype = None
    library.offmoe_program.restype = ctypes.c_int64
    library.offmoe_route.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return library


def check_structs(library: ctypes.CDLL) -> None:
    """Raise OSError where a struct, or a field of one, has another size or place in the library than in structs.py.

    A field of the wrong width or order would make the kernels read and write where nobody has put anything.
    """
    library.offmoe_layout.restype = ctypes.c_char_p
    library.offmoe_layout.argtypes = (ctypes.c_int32, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int64))
    theirs: dict[str, tuple[int, int]] = {}
    offset, size = ctypes.c_int64(), ctypes.c_int64()
    while (name := library.offmoe_layout(len(theirs), ctypes.byref(offset), ctypes.byref(size))) is not None:
        theirs[name.decode()] = (offset.value, size.value)
    ours = field_places()
    for struct in (*theirs, *ours):
        if theirs.get(struct) != ours.get(struct):
            raise OSError(
                f"the CPU kernels' {struct} is {_place(theirs.get(struct))}, offmoe's {_place(ours.get(struct))}; "
                "install offmoe again"
            )


def _place(place: tuple[int, int] | None) -> str:
    return "missing" if place is None else f"{place[1]} bytes at {place[0]}"
