"""Small changes to a model's folder: keys of its JSON files, a byte-level tokenizer; and replies of given ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import offmoe


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes a key away."""
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def byte_tokenizer(folder: Path, *specials: str, eos: str | None = None, template: str | None = None) -> None:
    """A byte-level tokenizer: printable ASCII, the four bytes of one emoji (86 to 89), and `specials` after them."""
    alphabet = [chr(code) for code in range(33, 118)] + ["Ġ", "ð", "Ł", "ĺ", "Ģ"]
    vocab = {letter: idx for idx, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in specials])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)


def always(engine: offmoe.Engine, wanted: list[int]) -> Callable[[torch.Tensor, torch.Tensor], int]:
    """A choice of tokens that follows `wanted`, whatever the logits are."""
    remaining = iter(wanted)
    return lambda ids, logits: next(remaining)
