"""Where a user's own files lie, by the custom of each system."""

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


def user_cache_folder() -> Path:
    """The folder for what programs of the user can do without: $XDG_CACHE_HOME, else ~/.cache. It may not exist."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named) if Path(named).is_absolute() else home_folder() / ".cache"


def config_folder() -> Path:
    """Settings. It may not exist."""
    return _folder("XDG_CONFIG_HOME", ".config", "Library/Application Support", "APPDATA")


def _folder(variable: str, linux: str, mac: str, windows: str) -> Path:
    named = os.environ.get(windows if sys.platform == "win32" else variable, "")
    if named and Path(named).is_absolute():  # a relative one is to be ignored, says the XDG specification
        return Path(named) / "offmoe"
    return home_folder() / (mac if sys.platform == "darwin" else linux) / "offmoe"
