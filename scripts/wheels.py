"""Build one wheel a platform, all on this machine (scripts/wheels installs what that needs).

The library of CPU kernels is called through ctypes and knows nothing of Python, so one wheel serves every version
(`py3-none-PLATFORM`). It is compiled with the C++ compiler in `ziglang` from PyPI, which brings the headers and
libraries of all platforms. Each library is then looked into: the file's format and processor, that it exports every
function, and that it needs nothing but the system's own libraries (on Linux: of glibc 2.17).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import kernels_build

ROOT = Path(__file__).parents[1]
SOURCES = kernels_build.SOURCES
LIBRARY_FOLDER = "offmoe/kernels/cpu"
GLIBC = (2, 17)
# Flags that zig names otherwise.
ZIG_FLAGS = {"-march=armv8.2-a+dotprod": "-mcpu=generic+v8_2a+dotprod"}


@dataclass(frozen=True, slots=True)
class Platform:
    """A target of the compiler, the wheel's platform tag, and the library's file name there."""

    target: str
    tag: str
    file_name: str
    system_libraries: str  # a pattern

    @property
    def isas(self) -> list[str]:
        """Instruction sets besides the portable one."""
        return kernels_build.isas_of(self.target.split("-")[0])


_LINUX = r"(libc|libm|libpthread|libdl|librt)\.so\.\d+|ld-linux-[\w-]+\.so\.\d"
_MACOS = r"/usr/lib/lib(System\.B|c\+\+\.1|c\+\+abi)\.dylib|@rpath/_kernels\.dylib"
_WINDOWS = r"(?i)(kernel32|ntdll|msvcrt|advapi32|api-ms-win-[\w-]+)\.dll"
PLATFORMS = {
    "linux-x86_64": Platform(
        "x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64.manylinux2014_x86_64", "_kernels.so", _LINUX
    ),
    "linux-aarch64": Platform(
        "aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64.manylinux2014_aarch64", "_kernels.so", _LINUX
    ),
    "macos-arm64": Platform("aarch64-macos.11.0", "macosx_11_0_arm64", "_kernels.dylib", _MACOS),
    "macos-x86_64": Platform("x86_64-macos.11.0", "macosx_11_0_x86_64", "_kernels.dylib", _MACOS),
    "windows-x86_64": Platform("x86_64-windows-gnu", "win_amd64", "_kernels.dll", _WINDOWS),
}  # fmt: skip


class WheelError(Exception):
    """A library that would not load where its wheel is installed."""


def main() -> int:
    """Build and check what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("platforms", nargs="*", choices=[[], *PLATFORMS], help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheels (default: dist)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        plain = plain_wheel(Path(folder))
        for name in options.platforms or PLATFORMS:
            begin = time.monotonic()
            library = build_library(name, ROOT / "build" / "wheels" / name)
            notes = check_library(library, PLATFORMS[name])
            wheel = platform_wheel(plain, PLATFORMS[name], library.read_bytes(), options.out)
            seconds, size = time.monotonic() - begin, wheel.stat().st_size / 1e6
            print(
                f"{wheel.name}: {size:.2f} MB, library {library.stat().st_size / 1e6:.2f} MB, {seconds:.0f} s; {notes}"
            )
    return 0


def plain_wheel(folder: Path) -> Path:
    """The package without the library, and without what an older build left."""
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True, env={**os.environ, "OFFMOE_BUILD_KERNELS": "0"})
    return next(folder.glob("*-py3-none-any.whl"))


def build_library(name: str, folder: Path) -> Path:
    """Compile and link for one platform, a line as each source is done. Objects newer than all sources are kept."""
    platform = PLATFORMS[name]
    folder.mkdir(parents=True, exist_ok=True)
    defines = kernels_build.defines_of(platform.isas)
    newest = max(path.stat().st_mtime for path in [*SOURCES.rglob("*.*"), Path(kernels_build.__file__)])

    def compile_one(source: str) -> Path:
        made = folder / kernels_build.object_of(source)
        if not made.exists() or made.stat().st_mtime < newest:
            begin = time.monotonic()
            flags = [ZIG_FLAGS.get(flag, flag) for flag in kernels_build.flags_of(source)] + [f"-I{SOURCES}", *defines]
            _compile(platform, [*flags, "-c", SOURCES / source, "-o", made])
            print(f"{name}: compiled {source} in {time.monotonic() - begin:.1f} s", flush=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compile_one, kernels_build.sources_of(*platform.isas)))
    library = folder / platform.file_name
    more = ["-Wl,-install_name,@rpath/_kernels.dylib"] if "macos" in platform.target else []
    _compile(platform, ["-shared", "-s", *more, *objects, "-o", library])
    return library


def _compile(platform: Platform, arguments: list[str | Path]) -> None:
    subprocess.run([sys.executable, "-m", "ziglang", "c++", "-target", platform.target, *arguments], check=True)


def check_library(library: Path, platform: Platform) -> str:
    """Say what the library needs. Raises WheelError for a function that is missing and for a library of others."""
    import lief

    found = lief.parse(library)
    if found is None:
        raise WheelError(f"{library} is no library that can be read")
    exported = {str(function.name).lstrip("_") for function in found.exported_functions}
    missing = wanted_functions() - exported
    needed = {str(getattr(item, "name", item)) for item in found.libraries}
    foreign = sorted(name for name in needed if re.fullmatch(platform.system_libraries, name) is None)
    if missing or foreign:
        raise WheelError(f"{library} does not export {sorted(missing)} and needs {foreign}")
    notes = f"needs {', '.join(sorted(Path(name).name for name in needed))}"
    versions = set(re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes()))
    if versions:
        newest = max((int(major), int(minor)) for major, minor in versions)
        if newest > GLIBC:
            raise WheelError(f"{library} needs glibc {newest[0]}.{newest[1]}, its tag says {GLIBC[0]}.{GLIBC[1]}")
        notes += f", glibc {newest[0]}.{newest[1]}"
    return notes


def wanted_functions() -> set[str]:
    """All that library.cpp and layout.cpp export."""
    sources = "".join((SOURCES / "ops" / name).read_text(encoding="utf-8") for name in ("library.cpp", "layout.cpp"))
    return set(re.findall(r"^[\w* ]*\b(offmoe_\w+)\(", sources, re.MULTILINE))


def platform_wheel(plain: Path, platform: Platform, library: bytes, out: Path) -> Path:
    """`plain` with the library in it and the platform's tags. The same input gives the same bytes."""
    name, version = plain.name.split("-")[:2]
    made, info = out / f"{name}-{version}-py3-none-{platform.tag}.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(plain) as source:
        files = {entry: source.read(entry) for entry in source.namelist() if entry != f"{info}/RECORD"}
    kept = [line for line in files[f"{info}/WHEEL"].decode().splitlines() if not line.startswith(("Root-Is", "Tag:"))]
    tags = [f"Tag: py3-none-{tag}" for tag in platform.tag.split(".")]
    files[f"{info}/WHEEL"] = "\n".join([*filter(None, kept), "Root-Is-Purelib: false", *tags, ""]).encode()
    files[f"{LIBRARY_FOLDER}/{platform.file_name}"] = library
    record = [f"{entry},{_digest(data)},{len(data)}" for entry, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        for entry, data in files.items():
            target.writestr(zipfile.ZipInfo(entry), data, zipfile.ZIP_DEFLATED)
    return made


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (WheelError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
