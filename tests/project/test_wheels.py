"""Wheels that carry the library for a platform: names, tags, records, and what is looked for in a library."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

import kernels_build
import pytest
import wheels
from places import ROOT

from offmoe.kernels.cpu import loader


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A wheel as setuptools makes one of a package without a library."""
    made = tmp_path / "offmoe-1.2-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as target:
        target.writestr("offmoe/__init__.py", "")
        target.writestr(
            "offmoe-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n\n"
        )
        target.writestr("offmoe-1.2.dist-info/RECORD", "offmoe/__init__.py,,\n")
    return made


@pytest.mark.parametrize("name", wheels.PLATFORMS)
def test_a_platform_wheel_has_the_library_its_tags_and_a_record_of_both(plain: Path, name: str, tmp_path: Path) -> None:
    platform = wheels.PLATFORMS[name]
    made = wheels.platform_wheel(plain, platform, b"a library", tmp_path)
    assert made.name == f"offmoe-1.2-py3-none-{platform.tag}.whl"
    with zipfile.ZipFile(made) as read:
        library = f"offmoe/kernels/cpu/{platform.file_name}"
        assert read.read(library) == b"a library"
        lines = read.read("offmoe-1.2.dist-info/WHEEL").decode().splitlines()
        assert lines == [
            "Wheel-Version: 1.0", "Root-Is-Purelib: false",
            *(f"Tag: py3-none-{tag}" for tag in platform.tag.split(".")),
        ]  # fmt: skip
        record = read.read("offmoe-1.2.dist-info/RECORD").decode().splitlines()
        digest = base64.urlsafe_b64encode(hashlib.sha256(b"a library").digest()).rstrip(b"=").decode()
        assert f"{library},sha256={digest},9" in record
        assert {line.split(",")[0] for line in record} == set(read.namelist())
    assert (ROOT / library).suffix in loader.SUFFIXES  # the loader looks for it


def test_the_loader_finds_a_wheels_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for platform in wheels.PLATFORMS.values():
        folder = tmp_path / platform.tag
        folder.mkdir()
        (folder / platform.file_name).write_bytes(b"no library")
        monkeypatch.setattr(loader, "__file__", str(folder / "loader.py"))
        kernels, note = loader.load_cpu_kernels("auto", threads=1)
        assert kernels is None and platform.file_name in note and "not built" not in note


def test_functions_looked_for_are_those_that_python_calls() -> None:
    wanted = wheels.wanted_functions()
    assert {"offmoe_abi_version", "offmoe_isa", "offmoe_open", "offmoe_encode", "offmoe_layout"} <= wanted
    assert all(name.startswith("offmoe_") for name in wanted)


def test_only_libraries_of_the_system_are_taken() -> None:
    import re

    taken = {
        "linux-x86_64": ["libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"],
        "macos-arm64": ["/usr/lib/libSystem.B.dylib"],
        "windows-x86_64": ["KERNEL32.dll", "api-ms-win-crt-heap-l1-1-0.dll"],
    }
    for name, libraries in taken.items():
        pattern = wheels.PLATFORMS[name].system_libraries
        assert all(re.fullmatch(pattern, library) for library in libraries)
        assert not any(re.fullmatch(pattern, library) for library in ("libstdc++.so.6", "libgomp.so.1", "vcomp140.dll"))


def test_every_source_is_compiled_for_some_platform_and_the_longest_first() -> None:
    sources = {path.relative_to(wheels.SOURCES).as_posix() for path in wheels.SOURCES.rglob("*.cpp")}
    assert {kernels_build.isa_of(name) for name in sources} == {None, "portable", *kernels_build.ISAS}
    compiled = [kernels_build.sources_of(*platform.isas) for platform in wheels.PLATFORMS.values()]
    assert {name for some in compiled for name in some} == sources
    assert all(some[0].startswith("isa/") for some in compiled)
    assert len({kernels_build.object_of(name) for name in sources}) == len(sources)
    assert "-ffp-contract=off" in kernels_build.flags_of("isa/avx2/quantise.cpp")
    assert "-mavx2" in kernels_build.flags_of("isa/avx2/quantise.cpp")
    assert "-ffp-contract=off" not in kernels_build.flags_of("ops/quantise.cpp")
    assert "-mavx2" not in kernels_build.flags_of(kernels_build.FACE)
