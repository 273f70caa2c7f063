"""The one part of the build that pyproject.toml cannot say: the library of CPU kernels, a file an instruction set.

Compiled are the instruction sets that this processor has; all of them with OFFMOE_LEVELS=all, for a folder that other
machines use too. The library is optional. Without a compiler, or where the compiler knows no AVX-512, offmoe is
installed without it (or without that level) and computes with torch; `offmoe plan` and the kernels' loader say so.
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
from kernels_build import LEVELS, compile_order, flags_of, level_of, native_levels

SOURCES = Path("offmoe/kernels/cpu/src")


class BuildKernels(build_ext):
    """Compiles each level with its own flags; a level that does not compile is left out."""

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
        """Every source with the flags of its level, several at once, a line as each is done."""
        is_x86 = platform.machine() in ("x86_64", "AMD64")
        native = not is_x86 or os.environ.get("OFFMOE_LEVELS") != "all"
        levels = ["portable", *(native_levels() if native else LEVELS)]
        stems = [path.stem for path in SOURCES.glob("*.cpp") if level_of(path.stem) in (None, *levels)]
        stems.remove("library")  # says which levels there are
        compiling = {pool.submit(self._compile, stem): stem for stem in compile_order(stems)}
        for done, future in enumerate(as_completed(compiling), 1):
            if future.exception() is None:
                seconds = future.result()[1]
                self._say(f"compiled {compiling[future]}.cpp in {seconds:.1f} s ({done} of {len(compiling) + 1})")
        missing = self._missing_levels(compiling)
        defines = [f"-DOFFMOE_HAS_{level.upper()}" for level in levels if level not in ("portable", *missing)]
        kept = [future for future, stem in compiling.items() if level_of(stem) not in missing]
        return [*(name for future in kept for name in future.result()[0]), *self._compile("library", defines)[0]]

    def _missing_levels(self, compiling: dict[Future[tuple[list[str], float]], str]) -> set[str]:
        """Levels that this compiler does not know. Raises what it says where it cannot compile the rest."""
        missing = set()
        for future, stem in compiling.items():
            level = level_of(stem)
            if (error := future.exception()) is None:
                continue
            if level not in LEVELS:
                raise error
            if level not in missing:
                self.warn(f"CPU kernels are built without {level}: {error}")
            missing.add(level)
        return missing

    def _compile(self, stem: str, more: list[str] | None = None) -> tuple[list[str], float]:
        """Names of the objects, and seconds."""
        begin = time.monotonic()
        source, flags = str(SOURCES / f"{stem}.cpp"), [*flags_of(stem), *(more or [])]
        objects: list[str] = self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)
        return objects, time.monotonic() - begin

    def _say(self, line: str) -> None:
        self.announce(line, level=logging.INFO)


# "0": without the library, for scripts/wheels.py, which compiles it for other platforms.
WITH_KERNELS = os.environ.get("OFFMOE_BUILD_KERNELS", "1") != "0"

setup(
    ext_modules=[
        Extension(
            "offmoe.kernels.cpu._kernels",
            sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
            language="c++",
            optional=True,
        )
    ]
    if WITH_KERNELS
    else [],
    cmdclass={"build_ext": BuildKernels},
)
