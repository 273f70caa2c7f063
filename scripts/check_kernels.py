"""Check the CPU kernels' sources: clang-format, and clang-tidy with the flags that each is compiled with.

    python scripts/check_kernels.py             # part of scripts/check; a minute on two cores
    python scripts/check_kernels.py --write     # formats in place

Sources for instruction sets of another kind of processor are only formatted.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernels_build

ROOT = Path(__file__).parents[1]
FOLDERS = (kernels_build.SOURCES, ROOT / "tests" / "kernels" / "cpp")


def main() -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="format the sources, and do not look into them")
    options = parser.parse_args()
    files = sorted(str(path) for folder in FOLDERS for path in folder.rglob("*") if path.suffix in {".cpp", ".h"})
    how = ["-i"] if options.write else ["--dry-run", "--Werror"]
    if subprocess.run([program("clang-format"), *how, *files], check=False).returncode:
        print("python scripts/check_kernels.py --write formats them", file=sys.stderr)
        return 1
    if options.write:
        return 0
    sources = kernels_build.sources_of(*kernels_build.isas_of(platform.machine()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(tidy, sources))
    print("".join(found), end="")
    return int(any(found))


def program(name: str) -> str:
    """The program that is installed beside this Python, else any."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def tidy(source: str) -> str:
    """Warnings of one source; empty for none."""
    flags = [flag for flag in kernels_build.flags_of(source) if not flag.startswith("-g")]
    command = [
        program("clang-tidy"),
        "--quiet",
        str(kernels_build.SOURCES / source),
        "--",
        f"-I{kernels_build.SOURCES}",
    ]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
