"""Tests of Triton kernels in its interpreter, which an environment variable chooses when the kernels are imported.

So one test of a file runs that file again, in a process of its own with the interpreter; the others, marked
`interpreted`, are what that process runs.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from patience import PATIENCE_S

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_under_the_interpreter")
outer = pytest.mark.skipif(INTERPRETED, reason="this is the inner run")


def pass_under_the_interpreter(file: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
