"""Build the CPU kernels with a driver that calls all of them (tests/kernels/cpp), under sanitizers, and run it.

    python scripts/sanitize.py                     # AddressSanitizer with UBSan, then ThreadSanitizer
    python scripts/sanitize.py thread --share 1    # one of the two; every case
    python scripts/sanitize.py --quick             # what takes under three minutes on two cores: no AVX-512, few cases

Objects are kept in build/sanitize and made again when a source has changed. Instruction sets that this processor lacks
are left out. Exit code 1: a fault; its report is on stderr.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import driver_build
import kernels_build

# Frame pointers, and no optimisation that would hide a fault or move it.
OPTIMISATION = ("-g1", "-O1", "-fno-omit-frame-pointer")
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}  # fmt: skip


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sanitizers", nargs="*", choices=[[], *SANITIZERS], help="default: all")
    parser.add_argument("--share", type=int, default=4, help="take one case of so many (default 4; 1 takes all)")
    parser.add_argument(
        "--quick", action="store_true", help="one case of 59, and no AVX-512, which compiles for minutes"
    )
    options = parser.parse_args()
    isas = kernels_build.native_isas()
    if options.quick and "avx512" in isas:
        isas.remove("avx512")
    share = 59 if options.quick else options.share
    return max(run(name, isas, share) for name in options.sanitizers or SANITIZERS)


def run(sanitizer: str, isas: list[str], share: int) -> int:
    """Build and run the driver; its exit code."""
    driver = build(sanitizer, isas)
    return subprocess.run([driver, str(share)], env=os.environ | OPTIONS, check=False).returncode


def build(sanitizer: str, isas: list[str]) -> Path:
    """The driver's program, made as far as it is not there."""
    print(f"{sanitizer} sanitizer; instruction sets: {', '.join(['portable', *isas])}", flush=True)
    folder = driver_build.ROOT / "build" / "sanitize" / "-".join([sanitizer, *isas])
    return driver_build.build("driver", isas, [*OPTIMISATION, *SANITIZERS[sanitizer]], folder)


if __name__ == "__main__":
    sys.exit(main())
