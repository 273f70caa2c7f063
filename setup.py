"""The one part of the build that pyproject.toml cannot say: the library of CPU kernels, a file an instruction set.

It is optional. Without a compiler, or where the compiler knows no AVX-512, offmoe is installed without it (or without
that level) and computes with torch; `offmoe plan` and the kernels' loader say so.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("offmoe/kernels/cpu/src")
FLAGS = ["-O3", "-g0", "-std=c++17", "-fPIC", "-Wno-psabi", "-Wno-uninitialized", "-fno-math-errno", "-pthread"]
LEVELS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vbmi",
        "-mavx512bf16",
        "-mavx512vnni",
        "-mfma",
        "-mf16c",
    ],
}

COMMON = (
    "pool.cpp", "values.cpp", "experts.cpp", "decode.cpp", "latent.cpp", "delta.cpp", "mamba.cpp", "layer.cpp",
    "route.cpp", "program.cpp", "layout.cpp", "library.cpp",
)  # fmt: skip


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
        """Every source with the flags of its level, several at once, the longest first."""
        is_x86 = platform.machine() in ("x86_64", "AMD64")
        of_levels = {
            level: [pool.submit(self._compile, path.name, flags) for path in SOURCES.glob(f"level_{level}*.cpp")]
            for level, flags in LEVELS.items() if is_x86
        }  # fmt: skip
        portable = pool.submit(self._compile, "level_portable.cpp", [])
        levels, objects = [], []
        for level, compiling in of_levels.items():
            try:
                objects += [name for compiled in compiling for name in compiled.result()]
                levels.append(f"-DOFFMOE_HAS_{level.upper()}")
            except Exception as error:  # noqa: BLE001  # whatever this compiler raises
                self.warn(f"CPU kernels are built without {level}: {error}")
        common = [pool.submit(self._compile, name, levels) for name in COMMON]
        return [*objects, *(name for compiled in [portable, *common] for name in compiled.result())]

    def _compile(self, name: str, flags: list[str]) -> list[str]:
        sources = [str(SOURCES / name)]
        return self.compiler.compile(sources, output_dir=self.build_temp, extra_postargs=[*FLAGS, *flags])


setup(
    ext_modules=[
        Extension(
            "offmoe.kernels.cpu._kernels",
            sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
