"""Flags that `offmoe tune` chose for a model, kept in a JSON file that the other commands read.

    {"models": {HASH: {"model": NAME, "flags": {"ram": "900MiB", "policy": "lru"}}}}

Flags that the user gives win. Where the user bounds memory (`ram`, `vram`, `expert_slots`), no saved bound applies.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offmoe.core.config import OPTION_NAMES, gone, make_config
from offmoe.core.errors import OutputError, UsageError
from offmoe.core.files import read_bounded, write_whole
from offmoe.core.folders import config_folder

FILE_NAME = "models.json"
MAX_BYTES = 16 << 20
_RENAMED = {"experts": "expert_slots"}  # files that are older than the new name
_MEMORY = frozenset({"ram", "vram", "expert_slots"})


@dataclass(frozen=True, kw_only=True)
class SavedFlags:
    """Flags of a file that apply: `flags` by option name, and the `path` they come from."""

    path: Path
    flags: dict[str, Any]

    def line(self) -> str:
        """One line for people."""
        given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.flags.items())
        return f"{given} from {self.path} (--config off ignores it)"


def default_path() -> Path:
    """The file that commands read when none is named."""
    return config_folder() / FILE_NAME


def read_flags(path: Path, model_hash: str, given: dict[str, Any]) -> SavedFlags | None:
    """Flags that `path` has for the model and `given`, the user's own, leaves open; None where there are none.

    Raises UsageError where the file cannot be read or has a flag that is none.
    """
    entry = _models(path).get(model_hash)
    if not isinstance(entry, dict) or not isinstance(entry.get("flags"), dict):
        return None
    saved = {_RENAMED.get(name, name): value for name, value in entry["flags"].items()}
    flags = {name: value for name, value in saved.items() if name not in given}
    unknown = [name for name in flags if name not in OPTION_NAMES]
    if unknown:
        why = f"has the flag {unknown[0]!r}, which is none" if (left := gone(unknown[0])) is None else f"says: {left}"
        raise UsageError(f"{path} {why}; run offmoe tune again, or --config off")
    try:
        make_config(**flags)
    except UsageError as error:
        raise UsageError(f"{path}: {error}; run offmoe tune again, or --config off") from None
    if _MEMORY & given.keys():
        flags = {name: value for name, value in flags.items() if name not in _MEMORY}
    return SavedFlags(path=path, flags=flags) if flags else None


def write_flags(path: Path, model_hash: str, model: str, flags: dict[str, Any]) -> None:
    """Put `flags` into `path`, keeping what it has of other models. Raises OutputError, UsageError."""
    _write(path, {**(_models(path) if path.exists() else {}), model_hash: {"model": model, "flags": flags}})


def _write(path: Path, models: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps({"models": models}, indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(f"the flags cannot be written to {path}: {error.strerror or error}; use --config") from None


def all_saved(path: Path) -> dict[str, SavedFlags]:
    """Flags of every model in `path`, by the model's name. Raises UsageError where it cannot be read."""
    found = {}
    for entry in _models(path).values() if path.is_file() else ():
        if isinstance(entry, dict) and isinstance(entry.get("flags"), dict):
            found[str(entry.get("model"))] = SavedFlags(path=path, flags=entry["flags"])
    return found


def forget_flags(path: Path, model_hash: str) -> bool:
    """Take a model's flags out of `path`; False where it has none. Raises OutputError, UsageError."""
    models = _models(path) if path.is_file() else {}
    if models.pop(model_hash, None) is None:
        return False
    _write(path, models)
    return True


def refuse_unwritable(path: Path, what: str) -> None:
    """Raise OutputError now, rather than after minutes, where a file `path` could not be made."""
    folder = Path(os.path.realpath(path)).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe: opening it will tell
        return
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "it is a folder" if path.is_dir() else f"{folder} cannot be written"
        raise OutputError(f"{what} cannot be written to {path}: {why}; choose another place")


def _models(path: Path) -> dict[str, Any]:
    try:
        models = json.loads(read_bounded(path, "--config", MAX_BYTES))["models"]
        if not isinstance(models, dict):
            raise TypeError("no table of models")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise UsageError(f"--config {path} is no file of flags ({reason}); remove it, or use --config off") from None
    return models
