"""The checkpoint's tokenizer, where it has one."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from offmoe.base.errors import CheckpointError, UnsupportedModelError

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the checkpoint in `folder`; None when it has no tokenizer files.

    Raises CheckpointError for files that cannot be read, UnsupportedModelError for a tokenizer that is Python code.
    """
    if not any((folder / name).is_file() for name in _FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception for a damaged tokenizer.json
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise UnsupportedModelError(
                f"{folder} has a tokenizer of its own Python code, which is not run unasked; read it, then use "
                "--trust-remote-code"
            ) from None
        raise CheckpointError(f"{folder} has a tokenizer that cannot be read: {reason[:200]}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if not tokenizer("one 2 three")["input_ids"]:  # transformers makes an empty one when the vocabulary is missing
        raise CheckpointError(f"{folder} has a tokenizer without a vocabulary; download tokenizer.json again")
    return tokenizer
