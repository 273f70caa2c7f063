"""Recognition of GGUF models by what is in a file and not by its name. No torch.

A GGUF file may be no language model: vision projectors (general.architecture `clip`), importance matrices, adapters
and control vectors come in the same container. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

from offmoe.core.errors import CheckpointError, ModelNotFoundError

MAGIC, SUFFIX = b"GGUF", ".gguf"
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_PIECE_NAME = re.compile(r".*\.gguf[.-](part|split)[-.]?\w+", re.IGNORECASE)
_PEEK_BYTES = 1 << 16
_TEXT = 8
# Beginnings of what is taken for GGUF, and how to get the file.
_OTHERS = {
    b"version https://git-lfs": "it is a pointer of Git LFS and not the file; run `git lfs pull`, or download the file",
    b"lmgg": "it is of llama.cpp's first format (ggml), before GGUF; convert the model again",
    b"fmgg": "it is of llama.cpp's format of March 2023 (ggmf), before GGUF; convert the model again",
    b"tjgg": "it is of llama.cpp's format of spring 2023 (ggjt), before GGUF; convert the model again",
    b"<": "it is a web page; download the file itself",
    b"PK": "it is a zip archive or PyTorch file; get the GGUF or safetensors version",
    bytes(16): "it begins with zeros, as an unfinished download does; download it again",
}
_BY_NAME = {"mmproj": "a vision projector", "imatrix": "an importance matrix"}
_BY_TYPE = {
    "mmproj": "a vision projector", "imatrix": "an importance matrix", "adapter": "an adapter (LoRA)",
    "vocab": "a vocabulary without a model",
}  # fmt: skip


def is_gguf(path: Path) -> bool:
    """True for a file that begins as GGUF, or whose name says so (then its reader says what is wrong with it)."""
    return path.is_file() and (path.suffix == SUFFIX or _first_bytes(path, 4) == MAGIC)


def why_not_gguf(path: Path) -> str:
    """A reason for people, of a file that does not begin with GGUF."""
    begin = _first_bytes(path, 64)
    if _PIECE_NAME.fullmatch(path.name):
        return "it is a piece of a file that was cut; join the pieces in order (cat a b c > model.gguf)"
    found = (reason for first, reason in _OTHERS.items() if begin.startswith(first))
    return next(found, "it does not begin with GGUF; point at the model's folder, or at its GGUF file")


def no_model(path: Path) -> str | None:
    """The kind of a GGUF file that is no language model, by its first metadata or its name; None for a model."""
    facts = _first_texts(path)
    if facts.get("general.architecture") == "clip":
        return "a vision projector"
    if facts.get("general.architecture") == "controlvector":
        return "a control vector"
    kind = facts.get("general.type")
    if kind is not None:
        return _BY_TYPE.get(kind)
    if "general.architecture" in facts:
        return None
    return next((what for word, what in _BY_NAME.items() if word in path.name.lower()), None)


def only_model(folder: Path) -> Path | None:
    """The one GGUF model of a folder and the folders in it, or the first part of a split one; None without any.

    Raises ModelNotFoundError naming the files where there are several, or none of them is a language model.
    """
    found = sorted(path for pattern in ("*.gguf", "*/*.gguf") for path in folder.glob(pattern))
    if not found:
        return None
    whole = [path for path in found if (match := SPLIT_NAME.fullmatch(path.name)) is None or int(match[2]) == 1]
    others = {path: what for path in whole if (what := no_model(path)) is not None}
    models = [path for path in whole if path not in others]
    if len(models) == 1:
        return models[0]
    names = ", ".join(str(path.relative_to(folder)) for path in models[:8])
    if models:
        raise ModelNotFoundError(f"{folder} has {len(models)} GGUF models; name one: {names}")
    if others:
        path, what = next(iter(others.items()))
        raise ModelNotFoundError(f"{folder} has no GGUF model: {path.name} is {what}; name the model's own file")
    raise ModelNotFoundError(f"{folder} has {found[0].name} and no first part of that model; download the rest")


def split_paths(path: Path) -> list[Path]:
    """All parts of a split file in order, or `path` alone. Raises CheckpointError naming the first that is missing."""
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise CheckpointError(f"{path} is part {int(match[2])} of {count} by its name; it was renamed")
    paths = [path.with_name(f"{match[1]}-{idx:05}-of-{match[3]}.gguf") for idx in range(1, count + 1)]
    missing = [part for part in paths if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {len(missing)} of {count} parts, first {missing[0].name}; download the rest"
        )
    return paths


def check_part(path: Path, metadata: dict[str, object], idx: int, count: int) -> None:
    """Raise CheckpointError where a file is another part of a split model than its name says."""
    number, of = metadata.get("split.no"), metadata.get("split.count", 1)
    if of in (0, 1) or not isinstance(of, int) or not isinstance(number, int):
        return
    if (number, of) != (idx, count):
        raise CheckpointError(
            f"{path} is part {number + 1} of {of} of a split model, by its name "
            f"{f'part {idx + 1} of {count}' if count > 1 else 'it is whole'}; give all parts their names back, "
            f"NAME-{number + 1:05}-of-{of:05}.gguf"
        )


def _first_bytes(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def _first_texts(path: Path) -> dict[str, str]:
    """Texts among the first metadata, as far as they lie in the file's first bytes before any list."""
    raw, at, found = _first_bytes(path, _PEEK_BYTES), 24, dict[str, str]()
    numbers = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    try:
        while raw[:4] == MAGIC and len(found) < 2:
            key, at = _text(raw, at)
            (kind,) = struct.unpack_from("<I", raw, at)
            at += 4
            if kind == _TEXT:
                value, at = _text(raw, at)
                found |= {key: value} if key in ("general.architecture", "general.type") else {}
            elif kind in numbers:
                at += numbers[kind]
            else:
                break
    except struct.error:
        pass
    return found


def _text(raw: bytes, at: int) -> tuple[str, int]:
    (count,) = struct.unpack_from("<Q", raw, at)
    end = at + 8 + count
    if end > len(raw):
        raise struct.error
    return raw[at + 8 : end].decode("utf-8", errors="replace"), end
