"""The driver that runs the CPU kernels under sanitizers (scripts/sanitize.py) reaches all of them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import driver_build
import kernels_build
from places import ROOT

from offmoe.kernels.cpu import structs

DRIVER = driver_build.DRIVER


def test_every_exported_function_is_called() -> None:
    exported = set(re.findall(r"\b(offmoe_\w+)\(", (kernels_build.SOURCES / kernels_build.FACE).read_text()))
    sources = "".join(path.read_text() for path in DRIVER.glob("*.cpp")) + (DRIVER / "calls.h").read_text()
    calls = [name for name in exported if len(re.findall(rf"\b{name}\(", sources)) >= 2]  # declared and called
    assert sorted(exported) == sorted(calls)


def test_every_kind_of_weights_has_a_line_in_the_table() -> None:
    named = set(re.findall(r'^    \{"(\w+)", ', (DRIVER / "made.h").read_text(), re.MULTILINE))
    assert named >= set(structs.QUANT_KINDS)
    assert named - set(structs.QUANT_KINDS) == {"f32", "bf16", "f16"}


def test_flags_are_those_of_the_build() -> None:
    assert set(kernels_build.ISAS) >= {"avx2", "avx512", "neon"}
    assert "-mavx2" in driver_build.flags_of("isa/avx2/avx2.cpp", ["avx2"])
    assert driver_build.flags_of(kernels_build.FACE, ["avx2"]) == ["-DOFFMOE_HAS_AVX2"]
    assert set(kernels_build.native_isas()) <= set(kernels_build.ISAS)


def test_an_object_is_made_again_when_a_header_has_changed(tmp_path: Path) -> None:
    source, header, made = tmp_path / "a.cpp", tmp_path / "a.h", tmp_path / "a.o"
    for path in (source, header, made):
        path.touch()
    assert driver_build.is_old(made)  # nothing says what it was made of
    made.with_suffix(".d").write_text(f"a.o: {source} \\\n {header}\n")
    later = max(path.stat().st_mtime for path in (source, header, ROOT / "scripts/kernels_build.py")) + 10
    _set_time(made, later)
    assert not driver_build.is_old(made)
    _set_time(header, later + 10)
    assert driver_build.is_old(made)


def _set_time(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))
