"""The choice of a hub model's files: its weights once, in the form that is read, and the small files beside them.

Not the same weights in other forms (`original/`, `consolidated*`, `onnx/`, pickles, GGUFs beside safetensors).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from offmoe.checkpoint.gguf.file import SUFFIX as GGUF_SUFFIX
from offmoe.checkpoint.index import INDEX_NAME, SINGLE_NAME
from offmoe.core.errors import ModelNotFoundError, UnsupportedModelError

_SMALL_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# The one folder of small files that transformers reads.
_TEMPLATES = "additional_chat_templates"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# GGUF files that are no language model: vision projectors, importance matrices.
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)


def small_names(names: Sequence[str], *, code: bool) -> list[str]:
    """config, tokenizer, templates and indexes; with `code` the model's Python files too."""
    suffixes = (*_SMALL_SUFFIXES, ".py") if code else _SMALL_SUFFIXES
    return [
        name
        for name in names
        if (name.endswith(suffixes) or name.startswith("tokenizer"))
        and ("/" not in name or name.split("/")[0] == _TEMPLATES)
        and not (name.endswith(".index.json") and name != INDEX_NAME)
        and not name.startswith("consolidated")
    ]


def weight_names(hub_id: str, names: Sequence[str], indexed: Sequence[str]) -> list[str]:
    """The files with the weights, `indexed` being what the index names. Raises OffmoeError subclasses."""
    if indexed and set(indexed) <= set(names):
        return list(indexed)
    if SINGLE_NAME in names:
        return [SINGLE_NAME]
    if indexed:
        missing = [name for name in indexed if name not in names]
        raise ModelNotFoundError(
            f"{hub_id} lacks {len(missing)} of {len(indexed)} shards on the hub, first {missing[0]}; the upload may "
            "not be complete: try again later"
        )
    loose = [name for name in names if name.endswith(".safetensors")]
    if loose:
        raise ModelNotFoundError(
            f"{hub_id} has {len(loose)} safetensors files (first {loose[0]}) but neither {SINGLE_NAME} nor "
            f"{INDEX_NAME}; take a version of it in Hugging Face's form"
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise UnsupportedModelError(
            f"{hub_id} holds only pickle files (first {pickles[0]}), which can run code when opened and are refused; "
            "get the safetensors version"
        )
    raise ModelNotFoundError(f"{hub_id} has no weights on the hub; check the name")


def is_tagged(name: str, tag: str) -> bool:
    """Whether a GGUF file's name has the part that a name like `owner/model:Q4_K_M` ends with."""
    words = re.escape(tag.lstrip(":"))
    return re.search(rf"(?:^|[-.]){words}(?:[-.]|$)", PurePosixPath(name).name, re.IGNORECASE) is not None


def gguf_parts(hub_id: str, names: Sequence[str], gguf: str | None) -> list[str]:
    """All parts of the GGUF file `gguf` (":TAG": the one whose name has TAG), or of the only one that there is.

    Raises ModelNotFoundError naming them.
    """
    models = [
        name
        for name in names
        if name.endswith(GGUF_SUFFIX)
        and not _NO_MODEL.search(PurePosixPath(name).name)
        and ((part := _PART.search(name)) is None or int(part[1]) == 1)
    ]
    if gguf is None and len(models) != 1:
        some = ", ".join(f"{hub_id}/{name}" for name in models[:8])
        raise ModelNotFoundError(f"{hub_id} has {len(models)} GGUF files and no safetensors; name one: {some}")
    if gguf is not None and gguf.startswith(":"):
        models = [name for name in models if is_tagged(name, gguf)] or models
        gguf = models[0] if len(models) == 1 else gguf
    first = models[0] if gguf is None else gguf
    if first not in names:
        have = ", ".join(models[:8]) or "none"
        raise ModelNotFoundError(f"{hub_id} has no file {first} on the hub; its GGUF files: {have}")
    match = _PART.search(first)
    if match is None:
        return [first]
    parts = [f"{first[: match.start()]}-{idx:05}-of-{match[2]}.gguf" for idx in range(1, int(match[2]) + 1)]
    missing = [part for part in parts if part not in names]
    if missing:
        raise ModelNotFoundError(f"{hub_id} lacks {len(missing)} of {len(parts)} parts on the hub, first {missing[0]}")
    return parts
