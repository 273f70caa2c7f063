"""The package has types for programs that use it: `pip install -e .` leaves a path that type checkers follow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# As a user's may be: types of torch and transformers take mypy two minutes, and are theirs.
SETTINGS = """
[mypy-torch.*,transformers.*,sympy.*,numpy.*]
follow_imports = skip
[mypy-offmoe.*]
ignore_errors = True
"""
USE = """
from offmoe.core.units import format_bytes

reveal_type(format_bytes(1))
format_bytes("1")
"""


def test_a_type_checker_finds_the_installed_package(tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(USE)
    (tmp_path / "mypy.ini").write_text("[mypy]\n" + SETTINGS)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "use.py"], cwd=tmp_path,
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 'Revealed type is "str"' in done.stdout or 'Revealed type is "builtins.str"' in done.stdout, done.stdout
    assert "incompatible type" in done.stdout and "Found 1 error" in done.stdout, done.stdout
