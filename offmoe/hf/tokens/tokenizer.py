"""The checkpoint's tokenizer, where it has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from offmoe.checkpoint.gguf.file import is_gguf
from offmoe.checkpoint.gguf.vocabulary import read_vocabulary
from offmoe.checkpoint.json_file import read_json
from offmoe.core.errors import CheckpointError, UnsupportedModelError
from offmoe.hf.tokens.gguf_tokenizer import GgufTokenizer, make_tokenizer
from offmoe.hf.tokens.tokenizing import tokenizing

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
_TEMPLATE_FILE = "chat_template.json"


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the checkpoint in `folder`, or of a GGUF file; None when there is none.

    Raises CheckpointError for files that cannot be read, UnsupportedModelError for a tokenizer that is Python code.
    """
    if is_gguf(folder):
        vocabulary = read_vocabulary(folder)
        if vocabulary is None:
            return None
        with tokenizing(str(folder)):
            return make_tokenizer(vocabulary)
    if not any((folder / name).is_file() for name in _FILES):
        return None
    if not trust_remote_code and _is_own_code(folder):
        raise UnsupportedModelError(
            f"{folder} has a tokenizer of its own Python code, which is not run unasked; read it, then use "
            "--trust-remote-code"
        )
    with tokenizing(str(folder)):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return _with_template(folder, _checked(folder, tokenizer))


def _with_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add the chat template of chat_template.json (Qwen3-Omni), which transformers gives to processors only."""
    path = folder / _TEMPLATE_FILE
    if tokenizer.chat_template is None and path.is_file():
        tokenizer.chat_template = read_json(path).get("chat_template")
    return tokenizer


def note_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Put the tokens that end a reply, as a GGUF file's vocabulary tells them, into the model's generation config."""
    if isinstance(tokenizer, GgufTokenizer) and tokenizer.end_ids and model.generation_config is not None:
        model.generation_config.eos_token_id = tokenizer.end_ids


def _checked(folder: Path, tokenizer: Any) -> PreTrainedTokenizerBase:
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    with tokenizing(str(folder)):
        ids = tokenizer("one 2 three")["input_ids"]
    if not ids:  # transformers makes an empty one when the vocabulary is missing
        raise CheckpointError(f"{folder} has a tokenizer without a vocabulary; download tokenizer.json again")
    return tokenizer


def _is_own_code(folder: Path) -> bool:
    """The config names Python files, and there is no tokenizer.json to use in their place."""
    path = folder / "tokenizer_config.json"
    return path.is_file() and "auto_map" in read_json(path) and not (folder / "tokenizer.json").is_file()
