"""The README says what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_models_table_is_current() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts/models_table.py"), "--check"], check=False)
    assert done.returncode == 0, "run python scripts/models_table.py"
