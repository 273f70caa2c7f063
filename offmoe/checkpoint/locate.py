"""From what the user typed to a model folder: a path, or a hub id that is fetched through huggingface_hub."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from offmoe.base.errors import ModelNotFoundError

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
# Weights as safetensors, and what config and tokenizer need; never pickles, never other frameworks' copies.
_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]


def is_hub_id(name: str) -> bool:
    """True for what is no path here and looks like a name on the hub."""
    path = Path(name).expanduser()
    return bool(_HUB_ID.match(name)) and not path.is_absolute() and not path.exists()


def demo_model_folder() -> Path:
    """The bundled demo model."""
    return Path(str(resources.files("offmoe"))) / "demo_model"


def locate_model(model: str | os.PathLike[str] | None) -> Path:
    """The folder of `model`, or its GGUF file; the demo model for None.

    Raises ModelNotFoundError saying what was tried.
    """
    if model is None:
        return demo_model_folder()
    name = os.fspath(model)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(path.glob("*.gguf"))
            if found:
                return _only_gguf(path, found)
            raise ModelNotFoundError(f"{path} has no config.json; point at a Hugging Face model folder")
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ModelNotFoundError(f"{path} is a file and no GGUF; point at the model's folder")
    if not _HUB_ID.match(name) or path.is_absolute():
        raise ModelNotFoundError(f"{name} does not exist; give a model folder, or a hub id like Qwen/Qwen3-30B-A3B")
    return _fetch(name)


def _only_gguf(folder: Path, found: list[Path]) -> Path:
    """The one model of a folder: a GGUF file, or the first part of a split one."""
    models = [path for path in found if "-of-" not in path.stem or "-00001-of-" in path.stem]
    if len(models) != 1:
        raise ModelNotFoundError(
            f"{folder} has {len(found)} GGUF files; name one: {', '.join(p.name for p in found[:8])}"
        )
    return models[0]


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_PATTERNS))
    except LocalEntryNotFoundError:
        reason = "it is not in the local hub cache and the hub is out of reach"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise ModelNotFoundError(f"no folder {hub_id}, and no such model on the hub: {reason}; check the name")
