"""Small vocabularies in GGUF files: byte pairs and sentencepiece's pairs by score, with tokens that do something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

# DeepSeek's, none of whose bars is a letter of the byte alphabet, and a user's own, made of that alphabet alone.
CONTROLS = (
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\uff5cUser\uff5c>",
)
USERS = ("<think>", "\u00e9\u00e9", "  ")


@dataclass(frozen=True, kw_only=True)
class MadeVocabulary:
    """What goes into a file: `kind` and `pre` as llama.cpp names them, other keys by their writer's methods."""

    kind: str
    tokens: Sequence[str]
    types: Sequence[int]
    pre: str | None = None
    merges: Sequence[str] | None = None
    scores: Sequence[float] | None = None
    keys: dict[str, Any] = field(default_factory=dict)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys to a file that is being written."""
        writer.add_tokenizer_model(self.kind)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores is not None:
            writer.add_token_scores(list(self.scores))
        if self.merges is not None:
            writer.add_token_merges(list(self.merges))
        for key, value in self.keys.items():
            add: Callable[[Any], None] = {
                bool: lambda value, key=key: writer.add_bool(f"tokenizer.ggml.{key}", value),
                int: lambda value, key=key: writer.add_uint32(f"tokenizer.ggml.{key}", value),
            }[type(value)]
            add(value)

    def save(self, path: Path, *, architecture: str = "llama") -> Path:
        """A file of the vocabulary alone."""
        writer = gguf.GGUFWriter(path, architecture)
        self.write(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: printable ones for themselves, others after."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + nth) for nth, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def byte_pairs(
    merges: Sequence[str], *, pre: str | None, controls: Sequence[str] = CONTROLS, users: Sequence[str] = USERS,
    **keys: Any,
) -> MadeVocabulary:  # fmt: skip
    """256 letters, a token a merge, then control and user-defined tokens."""
    plain = [*byte_letters(), *(merge.replace(" ", "", 1) for merge in merges)]
    types = [TokenType.NORMAL] * len(plain) + [TokenType.CONTROL] * len(controls)
    types += [TokenType.USER_DEFINED] * len(users)
    return MadeVocabulary(
        kind="gpt2", pre=pre, tokens=[*plain, *controls, *users], types=types, merges=merges, keys=keys
    )


def pairs_by_score(
    words: Sequence[str], *, controls: Sequence[str] = CONTROLS, users: Sequence[str] = USERS, **keys: Any
) -> MadeVocabulary:
    """As sentencepiece makes it: unknown, begin, end, the bytes, `words` with falling scores, the ASCII letters."""
    letters = [letter for letter in ["\u2581", *map(chr, range(0x21, 0x7F))] if letter not in words]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    types += [TokenType.NORMAL] * (len(words) + len(letters)) + [TokenType.CONTROL] * len(controls)
    types += [TokenType.USER_DEFINED] * len(users)
    tokens = [*head, *words, *letters, *controls, *users]
    plain = [-float(nth) for nth in range(len(words) + len(letters))]
    scores = [0.0] * len(head) + plain + [-1000.0] * (len(controls) + len(users))
    return MadeVocabulary(kind="llama", pre="default", tokens=tokens, types=types, scores=scores, keys=keys)
