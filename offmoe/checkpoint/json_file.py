"""JSON objects from a checkpoint's files, which may say anything."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from offmoe.checkpoint.shard_file import read_refused
from offmoe.core.errors import CheckpointError, ModelNotFoundError

MAX_JSON_BYTES = 256 << 20
# Objects and lists within each other. Published files have five at most.
MAX_JSON_DEPTH = 64


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint. Raises ModelNotFoundError or CheckpointError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes; more than {MAX_JSON_BYTES} is no model file"
            )
        raw = path.read_bytes()
        if raw.startswith(codecs.BOM_UTF8):
            raise CheckpointError(
                f"{path} begins with a byte order mark, which no reader of JSON takes; save it as UTF-8 without one"
            )
        value = json.loads(raw.decode())
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path.parent} has no {path.name}; point at a Hugging Face model folder") from None
    except OSError as error:
        raise read_refused(path, error) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object; download it again")
    if not _is_flat(value):
        raise CheckpointError(f"{path} is nested more than {MAX_JSON_DEPTH} deep, as no model's is; download it again")
    return value


def _is_flat(value: object) -> bool:
    """Whether readers that call themselves for what is inside come to an end."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
    return not level


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
