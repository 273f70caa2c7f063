"""Build the CPU kernels with a driver that calls all of them (tests/cpp), under sanitizers, and run it.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernels_build

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "tests" / "cpp"
# Frame pointers, and no optimisation that would hide a fault or move it.
COMMON = [
    "-std=c++17",
    "-g1",
    "-O1",
    "-fno-omit-frame-pointer",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-fno-math-errno",
    "-pthread",
]
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
        "--quick", action="store_true", help="one case of 60, and no AVX-512, which compiles for minutes"
    )
    options = parser.parse_args()
    isas = kernels_build.native_isas()
    if options.quick and "avx512" in isas:
        isas.remove("avx512")
    share = 60 if options.quick else options.share
    return max(run(name, isas, share) for name in options.sanitizers or SANITIZERS)


def run(sanitizer: str, isas: list[str], share: int) -> int:
    """Build and run the driver; its exit code."""
    driver = build(sanitizer, isas)
    return subprocess.run([driver, str(share)], env=os.environ | OPTIONS, check=False).returncode


def build(sanitizer: str, isas: list[str]) -> Path:
    """The driver's program, made as far as it is not there."""
    folder = ROOT / "build" / "sanitize" / "-".join([sanitizer, *isas])
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{sanitizer} sanitizer; instruction sets: {', '.join(['portable', *isas])}", flush=True)
    jobs: list[tuple[Path, Path, list[str]]] = [
        (kernels_build.SOURCES / name, folder / kernels_build.object_of(name), flags_of(name, isas))
        for name in kernels_build.sources_of(*isas)
    ]
    jobs += [(source, folder / f"{source.stem}.o", []) for source in sorted(DRIVER.glob("*.cpp"))]
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        old = [job for job in jobs if is_old(job[1])]
        list(threads.map(lambda job: compile_one(job[0], job[1], job[2], SANITIZERS[sanitizer]), old))
    program, objects = folder / "driver", [made for _, made, _ in jobs]
    subprocess.run([compiler(), *SANITIZERS[sanitizer], *objects, "-o", program, "-pthread"], check=True)
    return program


def flags_of(name: str, isas: list[str]) -> list[str]:
    """The flags of a source besides COMMON: of its instruction set, or which ones there are."""
    return list(kernels_build.ISAS.get(kernels_build.isa_of(name) or "", kernels_build.defines_of(isas)))


def compile_one(source: Path, target: Path, flags: list[str], sanitizer: list[str]) -> None:
    """One object. Raises CalledProcessError."""
    includes = [f"-I{kernels_build.SOURCES}", f"-I{DRIVER}"]
    command: list[str | Path] = [compiler(), *COMMON, *sanitizer, *flags, *includes, "-MMD", "-c", source, "-o", target]
    subprocess.run(command, check=True)


def is_old(target: Path) -> bool:
    """An object that is not there, or older than something that it was made of."""
    made_of = target.with_suffix(".d")
    if not target.exists() or not made_of.exists():
        return True
    names = made_of.read_text(encoding="utf-8").replace("\\\n", " ").split()[1:]
    paths = [Path(name) for name in names] + [ROOT / "scripts" / "kernels_build.py"]
    return any(not path.exists() or path.stat().st_mtime > target.stat().st_mtime for path in paths)


def compiler() -> str:
    """Name of the compiler, as build tools have it: CXX, or g++."""
    return os.environ.get("CXX", "g++")


if __name__ == "__main__":
    sys.exit(main())
