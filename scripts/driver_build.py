"""Compiles the CPU kernels with the programs in tests/kernels/cpp that call all of them.

Objects are kept and made again when a source or a header has changed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernels_build

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "tests" / "kernels" / "cpp"
PROGRAMS = ("driver", "compare")  # sources with a main function
COMMON = ("-std=c++17", "-Wno-psabi", "-Wno-uninitialized", "-fno-math-errno", "-pthread")


def build(
    program: str,
    isas: list[str],
    flags: Sequence[str],
    folder: Path,
    compiler: str | None = None,
    library: Path | None = None,
) -> Path:
    """The program of that name, made as far as it is not there, with the portable instruction set and `isas`.

    `compiler`: as build tools have it where none is given: the variable CXX, or g++. `library`: one that was built
    already, with `isas`; without it the sources are compiled. Raises CalledProcessError.
    """
    compiler = compiler or os.environ.get("CXX", "g++")
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (kernels_build.SOURCES / name, folder / kernels_build.object_of(name), [*flags, *flags_of(name, isas)])
        for name in (kernels_build.sources_of(*isas) if library is None else [])
    ]
    for source in sorted(DRIVER.glob("*.cpp")):
        if source.stem == program or source.stem not in PROGRAMS:
            jobs.append((source, folder / f"{source.stem}.o", [*flags, *kernels_build.defines_of(isas)]))
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        old = [job for job in jobs if is_old(job[1])]
        list(threads.map(lambda job: compile_one(compiler, *job), old))
    made = folder / program
    command: list[str | Path] = [compiler, *flags, *(job[1] for job in jobs)]
    if library is not None:
        command += [library, f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*command, "-o", made, "-pthread"], check=True)
    return made


def flags_of(name: str, isas: list[str]) -> list[str]:
    """The flags of one of the kernels' sources: of its instruction set, or which ones there are."""
    if kernels_build.isa_of(name) is None:
        return kernels_build.defines_of(isas)
    return [flag for flag in kernels_build.flags_of(name) if flag not in kernels_build.FLAGS]


def compile_one(compiler: str, source: Path, target: Path, flags: list[str]) -> None:
    """One object. Raises CalledProcessError."""
    includes = [f"-I{kernels_build.SOURCES}", f"-I{DRIVER}"]
    command: list[str | Path] = [compiler, *COMMON, *flags, *includes, "-MMD", "-c", source, "-o", target]
    subprocess.run(command, check=True)


def is_old(target: Path) -> bool:
    """An object that is not there, or older than something that it was made of."""
    made_of = target.with_suffix(".d")
    if not target.exists() or not made_of.exists():
        return True
    names = made_of.read_text(encoding="utf-8").replace("\\\n", " ").split()[1:]
    paths = [Path(name) for name in names] + [ROOT / "scripts" / "kernels_build.py"]
    return any(not path.exists() or path.stat().st_mtime > target.stat().st_mtime for path in paths)
