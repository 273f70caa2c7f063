"""No exception of C++ leaves the CPU kernels: memory that the system refuses them is an error like any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import save_tiny
from patience import PATIENCE_S
from places import python_path

from offmoe.core.errors import ResourceError
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.loader import usable_levels

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="puts its own operator new before all others")
@pytest.mark.skipif(not usable_levels(), reason="no CPU kernels here")
def test_any_memory_may_be_refused(tmp_path: Path) -> None:
    """In the caller's thread and in a task: the message, and right ids afterwards. It was std::terminate."""
    assert COMPILER is not None
    new = tmp_path / "failing_new.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-std=c++17", HERE / "failing_new.cpp", "-o", new], check=True)
    model = save_tiny(tmp_path / "model")
    ran = subprocess.run(
        [sys.executable, HERE / "failing_new.py", new, model, "3"], capture_output=True, text=True, check=False,
        env={**os.environ, "LD_PRELOAD": str(new), "OMP_NUM_THREADS": "2", "PYTHONPATH": python_path()},
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["wrong"] == [] and found["refused"] >= 8 and found["calls"] > 20, found


def test_other_refusals_have_a_name() -> None:
    refused: Any = SimpleNamespace(
        offmoe_open=lambda *_: 1, offmoe_close=lambda _: None, offmoe_linear=lambda *_: 2, offmoe_program=lambda *_: -2,
        offmoe_route=lambda *_: 2,
    )  # fmt: skip
    kernels = CpuKernels(refused, "portable", 0, 1, 0)
    for call in (
        lambda: kernels.run_linear(0), lambda: kernels.run_program(0), lambda: kernels.run_route(0, 0, 0),
    ):  # fmt: skip
        with pytest.raises(ResourceError, match="refuses the CPU kernels a lock or a thread"):
            call()
    kernels.close()
