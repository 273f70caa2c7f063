"""Compare the CPU kernels of every instruction set with the portable ones (tests/kernels/cpp/compare.cpp).

    python scripts/compare_kernels.py                    # of this processor
    python scripts/compare_kernels.py --target aarch64   # cross-compiled, run by qemu-aarch64-static
    python scripts/compare_kernels.py --share 1          # every case, where the usual is one of 19
    python scripts/compare_kernels.py --quick            # one of 401, compiled with less optimisation: under a minute
    python scripts/compare_kernels.py --built build/wheels/linux-x86_64/_kernels.so    # as a wheel has it

Every linear, expert, norm, attention, layer and encoding is computed by each set, from the same numbers. Exit code 1:
some kind is beyond its bound, or a row has other bits alone than in company. For another processor than this one it
needs a cross compiler and qemu's user-mode emulation: on Debian, `g++-aarch64-linux-gnu` and `qemu-user-static`.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import driver_build
import kernels_build

SYSTEM = "/usr/aarch64-linux-gnu"  # of the cross compiler: where the emulator finds the C library
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
FLAGS, QUICK_FLAGS = ("-O3", "-g0"), ("-O1", "-g0")  # as the library is built, and compiled in a third of the time
# No multiples of 3: types take turns.
USUAL_SHARE, QUICK_SHARE = 19, 401


def main() -> int:
    """Build and run what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", choices=["native", "aarch64"], default="native", help="default: this processor")
    parser.add_argument("--share", type=int, help=f"take one case of so many (default {USUAL_SHARE}; 1 takes all)")
    parser.add_argument("--quick", action="store_true", help=f"one case of {QUICK_SHARE}, less optimised")
    parser.add_argument("--built", type=Path, help="compare this library, of a wheel, and compile none")
    options = parser.parse_args()
    if options.target == "aarch64" and (missing := missing_tools()):
        print(f"error: {missing}", file=sys.stderr)
        return 2
    share = options.share or (QUICK_SHARE if options.quick else USUAL_SHARE)
    program = command(options.target, QUICK_FLAGS if options.quick else FLAGS, options.built)
    return subprocess.run([*program, str(share)], check=False).returncode


def command(target: str, flags: tuple[str, ...], built: Path | None = None) -> list[str]:
    """The command that runs the comparison, whose program is built first.

    `built`: a library for `target`, with all instruction sets of its processors.
    """
    native = kernels_build.isas_of(platform.machine())
    is_cross = target == "aarch64" and native != kernels_build.isas_of(target)
    isas = kernels_build.isas_of(target) if is_cross else native if built else kernels_build.native_isas()
    name = "".join([target, *flags, "-built" if built else ""])
    flags = (*flags, "-static") if is_cross and built is None else flags
    program = driver_build.build(
        "compare", isas, flags, driver_build.ROOT / "build" / "compare" / name, COMPILER if is_cross else None,
        built.resolve() if built else None,
    )  # fmt: skip
    return [EMULATOR, "-L", SYSTEM, str(program)] if is_cross else [str(program)]


def missing_tools() -> str | None:
    """Which of the programs that run another processor's kernels are not installed, in a sentence; None if all are."""
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    names = " and ".join(missing)
    return f"{names} not found; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static" if missing else None


if __name__ == "__main__":
    sys.exit(main())
