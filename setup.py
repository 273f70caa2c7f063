"""The one part of the build that pyproject.toml cannot say: the library of CPU kernels, a file an instruction set.

Compiled are the instruction sets that this processor has; all of them with OFFMOE_LEVELS=all, for a folder that other
machines use too. The library is optional. Without a compiler, or where the compiler knows no AVX-512, offmoe is
installed without it (or without that set) and computes with torch; `offmoe plan` and the kernels' loader say so.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "scripts"))
from kernels_build import FACE, FOLDER, ISAS, SOURCES, defines_of, flags_of, isa_of, isas_of, native_isas, sources_of


class BuildKernels(build_ext):
    """Compiles each instruction set with its own flags; one that does not compile is left out."""

    def build_extension(self, ext: Extension) -> None:
        """A shared library under the extension's file name; it is loaded with ctypes and is no Python module."""
        target = Path(self.get_ext_fullpath(ext.name))
        temporary = Path(self.build_temp)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = self._compile_all(pool)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), target_lang="c++", extra_postargs=["-pthread"])

    def _compile_all(self, pool: ThreadPoolExecutor) -> list[str]:
        """Every source with the flags of its instruction set, several at once, a line as each is done."""
        isas = isas_of(platform.machine()) if os.environ.get("OFFMOE_LEVELS") == "all" else native_isas()
        compiling = {pool.submit(self._compile, name): name for name in sources_of(*isas) if name != FACE}
        for done, future in enumerate(as_completed(compiling), 1):
            if future.exception() is None:
                seconds = future.result()[1]
                self._say(f"compiled {compiling[future]} in {seconds:.1f} s ({done} of {len(compiling) + 1})")
        missing = self._missing_isas(compiling)
        defines = defines_of([isa for isa in isas if isa not in missing])
        kept = [future for future, name in compiling.items() if isa_of(name) not in missing]
        return [*(name for future in kept for name in future.result()[0]), *self._compile(FACE, defines)[0]]

    def _missing_isas(self, compiling: dict[Future[tuple[list[str], float]], str]) -> set[str]:
        """Instruction sets that this compiler does not know. Raises its error where it cannot compile the rest."""
        missing = set()
        for future, name in compiling.items():
            isa = isa_of(name)
            if (error := future.exception()) is None:
                continue
            if isa not in ISAS:
                raise error
            if isa not in missing:
                self.warn(f"CPU kernels are built without {isa}: {error}")
            missing.add(isa)
        return missing

    def _compile(self, source: str, more: list[str] | None = None) -> tuple[list[str], float]:
        """Names of the objects, and seconds."""
        begin = time.monotonic()
        objects: list[str] = self.compiler.compile(
            [f"{FOLDER}/{source}"], output_dir=self.build_temp, include_dirs=[FOLDER],
            extra_postargs=[*flags_of(source), *(more or [])],
        )  # fmt: skip
        return objects, time.monotonic() - begin

    def _say(self, line: str) -> None:
        self.announce(line, level=logging.INFO)


def found(pattern: str) -> list[str]:
    """Files among the sources, relative to this one."""
    return [f"{FOLDER}/{path.relative_to(SOURCES).as_posix()}" for path in sorted(SOURCES.rglob(pattern))]


# "0": without the library, for scripts/wheels.py, which compiles it for other platforms.
WITH_KERNELS = os.environ.get("OFFMOE_BUILD_KERNELS", "1") != "0"

setup(
    ext_modules=[
        Extension(
            "offmoe.kernels.cpu._kernels",
            sources=found("*.cpp"),
            depends=found("*.h"),
            language="c++",
            optional=True,
        )
    ]
    if WITH_KERNELS
    else [],
    cmdclass={"build_ext": BuildKernels},
)
