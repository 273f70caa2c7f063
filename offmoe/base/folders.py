"""Where a user's own files lie, by the custom of each system."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def config_folder() -> Path:
    """Settings. It may not exist."""
    return _folder("XDG_CONFIG_HOME", ".config", "Library/Application Support", "APPDATA")


def _folder(variable: str, linux: str, mac: str, windows: str) -> Path:
    named = os.environ.get(windows if sys.platform == "win32" else variable, "")
    if named and Path(named).is_absolute():  # a relative one is to be ignored, says the XDG specification
        return Path(named) / "offmoe"
    return Path.home() / (mac if sys.platform == "darwin" else linux) / "offmoe"
