"""Memory that a checkpoint's tokenizer takes, from headers and file sizes alone. No torch, no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Measured, libraries already loaded (nine vocabularies of 32,000 to 262,144 tokens, 5 to 72 MiB): a token or a merge of
# byte pairs takes 93 to 150 bytes, and a token of sentencepiece's, whose pairs are made from scores, 310 to 460.
_PAIR_BYTES, _SCORED_BYTES = 150, 460
# A tokenizer.json of 11.5 MB (151,936 tokens, 151,387 merges) takes 51 MiB.
_TIMES_FILE = 4.7


def gguf_tokenizer_bytes(metadata: dict[str, Any]) -> int:
    """Bytes in memory of the tokenizer made of a GGUF file's metadata."""
    tokens, merges = (_count(metadata.get(f"tokenizer.ggml.{name}")) for name in ("tokens", "merges"))
    if metadata.get("tokenizer.ggml.model") == "llama":
        return tokens * _SCORED_BYTES
    return (tokens + merges) * _PAIR_BYTES


def folder_tokenizer_bytes(folder: Path) -> int:
    """Bytes in memory of the tokenizer.json in `folder`; 0 without one (or where it was not fetched)."""
    try:
        return round((folder / "tokenizer.json").stat().st_size * _TIMES_FILE)
    except OSError:
        return 0


def _count(items: Any) -> int:
    return len(items) if isinstance(items, list) else getattr(items, "num_items", 0)
