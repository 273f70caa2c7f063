"""The kernels for other processors than this one are run in an emulator and give what the portable ones give."""

from __future__ import annotations

import subprocess

import compare_kernels
import driver_build
import kernels_build
import pytest


def test_processors_have_the_instruction_sets_that_are_compiled_for_them() -> None:
    assert kernels_build.isas_of("AMD64") == kernels_build.isas_of("x86_64") == ["avx2", "avx512"]
    assert kernels_build.isas_of("arm64") == kernels_build.isas_of("aarch64") == ["neon", "neon_dot"]
    assert kernels_build.isas_of("riscv64") == []
    assert not {"isa/neon/neon.cpp"} & set(kernels_build.sources_of("avx2", "avx512"))
    assert {"isa/neon/neon.cpp", "isa/portable/portable.cpp"} <= set(kernels_build.sources_of("neon"))
    assert {"isa/neon_dot/neon_dot.cpp"} <= set(kernels_build.sources_of("neon_dot"))


def test_each_program_has_a_main_function_and_no_other_source_has_one() -> None:
    sources = driver_build.DRIVER.glob("*.cpp")
    assert {path.stem for path in sources if "int main(" in path.read_text()} == set(driver_build.PROGRAMS)


@pytest.mark.slow
@pytest.mark.skipif(compare_kernels.missing_tools() is not None, reason=compare_kernels.missing_tools() or "")
def test_neon_kernels_give_what_the_portable_ones_give() -> None:
    command = compare_kernels.command("aarch64", compare_kernels.QUICK_FLAGS)
    run = subprocess.run([*command, str(compare_kernels.QUICK_SHARE)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith(("neon ", "neon_dot "))]
    for kind in ("linear", "product", "experts", "norm", "attention", "latent", "layer", "program", "codes", "delta"):
        for isa in ("neon", "neon_dot"):
            assert any(line.startswith(f"{isa} {kind}") for line in lines), (isa, kind)
    assert run.stdout.splitlines()[-1] == "every kernel is within its bound"
