"""Folders of this repository, and the path of a Python program that takes helpers of the tests."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SCRIPTS = ROOT / "scripts"


def python_path() -> str:
    """PYTHONPATH of such a program: every folder of tests, then the package."""
    folders = sorted(path for path in TESTS.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))
    return os.pathsep.join(map(str, (*folders, ROOT)))
