"""Helpers of the tests, for scripts: importing this module puts their folders, and the package, on the path."""

from __future__ import annotations

import sys
from pathlib import Path

_FOLDERS = ("support", "simulators", "families", "faults", "kernels")
_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [*(str(_ROOT / "tests" / name) for name in _FOLDERS), str(_ROOT)]
