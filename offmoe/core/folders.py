"""The folders of a user's own files, by the custom of each system: one rule for all that offmoe keeps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Stands for the home of a user without one (a container's unknown number, without HOME): nothing is below it, and
# nothing can be made there, so that settings are the defaults and measurements are not kept.
NO_HOME = Path(os.devnull)


def home_folder() -> Path:
    """The user's home, or NO_HOME."""
    try:
        return Path.home()
    except RuntimeError:
        return NO_HOME


def expand(path: str | os.PathLike[str]) -> Path:
    """`path` with ~ as the user's home. A ~ of a user that is not known stays: it may be a file's name."""
    parts = Path(path).parts
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return NO_HOME.joinpath(*parts[1:]) if parts[0] == "~" else Path(path)


def cache_folder() -> Path:
    """Folder of files that can be done without: a machine's measured speeds, counts of experts' uses. It may not exist.

    $OFFMOE_CACHE where that is set, else the system's folder for such files.
    """
    own = os.environ.get("OFFMOE_CACHE")
    return Path(own) if own else _folder("XDG_CACHE_HOME", ".cache", "Library/Caches", "LOCALAPPDATA")


def config_folder() -> Path:
    """Settings. It may not exist."""
    return _folder("XDG_CONFIG_HOME", ".config", "Library/Application Support", "APPDATA")


def _folder(variable: str, linux: str, mac: str, windows: str) -> Path:
    named = os.environ.get(windows if sys.platform == "win32" else variable, "")
    if named and Path(named).is_absolute():  # a relative one is to be ignored, says the XDG specification
        return Path(named) / "offmoe"
    return home_folder() / (mac if sys.platform == "darwin" else linux) / "offmoe"
