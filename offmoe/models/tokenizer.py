"""The checkpoint's tokenizer, where it has one."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from offmoe.base.errors import CheckpointError, UnsupportedModelError
from offmoe.checkpoint.index import read_json

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the checkpoint in `folder`; None when it has no tokenizer files.

    Raises CheckpointError for files that cannot be read, UnsupportedModelError for a tokenizer that is Python code.
    """
    if not any((folder / name).is_file() for name in _FILES):
        return None
    if not trust_remote_code and _is_own_code(folder):
        raise UnsupportedModelError(
            f"{folder} has a tokenizer of its own Python code, which is not run unasked; read it, then use "
            "--trust-remote-code"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception for a damaged tokenizer.json
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} has a tokenizer that cannot be read: {reason}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if not tokenizer("one 2 three")["input_ids"]:  # transformers makes an empty one when the vocabulary is missing
        raise CheckpointError(f"{folder} has a tokenizer without a vocabulary; download tokenizer.json again")
    return tokenizer


def _is_own_code(folder: Path) -> bool:
    """The config names Python files, and there is no tokenizer.json to use in their place."""
    path = folder / "tokenizer_config.json"
    return path.is_file() and "auto_map" in read_json(path) and not (folder / "tokenizer.json").is_file()
