"""The loader says when the library lacks the best instruction set of the processor."""

from __future__ import annotations

from pathlib import Path

import kernels_build
import pytest
from cpu_cases import needs_library

from offmoe.kernels.cpu import loader
from offmoe.kernels.cpu.loader import load_cpu_kernels
from offmoe.machine.instruction_sets import PARTS, instruction_sets

INTEL = "flags\t\t: fpu sse2 avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512vbmi avx512_bf16 avx512_vnni\n"


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        (INTEL, ["avx512", "avx2"]),
        (INTEL.replace("avx512_bf16", ""), ["avx2"]),
        ("flags\t\t: fpu sse2\n", []),
        ("Features\t: fp asimd evtstrm aes asimddp\n", ["neon_dot", "neon"]),
        ("Features\t: fp asimd\n", ["neon"]),
    ],
)
def test_sets_are_read_from_what_the_system_says(tmp_path: Path, text: str, sets: list[str]) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert instruction_sets(tmp_path / "cpuinfo") == sets


def test_no_set_is_known_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert instruction_sets(tmp_path / "none") == []


def test_they_are_the_sets_that_are_compiled() -> None:
    assert set(PARTS) == set(kernels_build.ISAS)
    for name in ("avx2", "avx512"):
        assert PARTS[name] == {flag.removeprefix("-m") for flag in kernels_build.ISAS[name]}


@needs_library
def test_a_better_set_than_those_built_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(loader.VARIABLE, raising=False)
    monkeypatch.setattr(loader, "instruction_sets", lambda: ["avx1024", "portable"])
    kernels, note = load_cpu_kernels(threads=1)
    assert kernels is not None
    assert note.startswith("this processor has avx1024, the library was built with ") and "install offmoe again" in note
    assert load_cpu_kernels("portable", threads=1)[1] == ""  # as it was asked for
    monkeypatch.setattr(loader, "instruction_sets", lambda: ["portable"])
    assert load_cpu_kernels(threads=1)[1] == ""
