"""The vocabulary of a GGUF file: tokens, their types, scores, merges, and which of them begin and end a text. No torch.

Tokens in GGUF are as the model's own tokenizer spells them (byte-level letters or sentencepiece's), and special ones as
a text shows them. Which types and names count as what: llama.cpp, src/llama-vocab.cpp of 0c1e57098.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offmoe.checkpoint.gguf.file import split_paths
from offmoe.checkpoint.gguf.header import MAX_TEXT_BYTES, GgufHeader, Skipped, read_gguf_header
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.core.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_PREFIX = "tokenizer.ggml."
_LENGTH = struct.Struct("<Q")
_NO_TOKEN = (1 << 32) - 1  # -1 where a converter had no such token
# Names that end a reply where the file has them. Some files have no key for them, or call them normal tokens.
END_NAMES = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
})  # fmt: skip
# Parts of a code base (padding, next repository, next file), which end a reply as well: key -> names.
_CODE_ENDS = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}
# Marks around a gap in code, which are control tokens whatever type the file gives them: key -> names.
_CODE_MARKS = {
    "fim_pre_token_id": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>", "\u2581<PRE>",
        "<|code_prefix|>", "<|prefix|>",
    ),
    "fim_suf_token_id": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>", "\u2581<SUF>",
        "<|code_suffix|>", "<|suffix|>",
    ),
    "fim_mid_token_id": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>", "\u2581<MID>",
        "<|code_middle|>", "<|middle|>",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """`kind` is llama.cpp's name of the algorithm, `splitting` that of the rule that cuts a text into words first.

    `types` has a number of every token, `scores` may be empty; `merges` are pairs with a space between, the first
    wins. `settings`: the other keys below `tokenizer.ggml.`. `num_rows` of the embedding, None for a file without one.
    """

    path: Path
    kind: str
    splitting: str | None
    tokens: list[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: list[str]
    settings: dict[str, Any]
    chat_template: str | dict[str, str] | None
    num_rows: int | None
    model_name: str = ""
    ids: dict[str, int] = field(repr=False)

    def token_id(self, key: str) -> int | None:
        """The token that `key`, such as `eos_token_id`, names; None where the file names none.

        Raises CheckpointError for one that is not in the vocabulary.
        """
        value = self.settings.get(key)
        if value is None or value in (-1, _NO_TOKEN):
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise CheckpointError(
                f"{self.path} says {_PREFIX}{key} {value!r}, its vocabulary has {len(self.tokens)} tokens; it was "
                "converted wrongly: get another file of the model"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A setting that is on or off."""
        value = self.settings.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path} says {_PREFIX}{key} {value!r}; true or false is needed")
        return value

    def special_types(self) -> dict[int, int]:
        """CONTROL or USER_DEFINED for each token that a text is searched for before anything else, by its id."""
        found = {
            idx: USER_DEFINED if kind == USER_DEFINED else CONTROL
            for idx, kind in enumerate(self.types)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        }
        named = self._named_ends()
        for key, names in (_CODE_ENDS | _CODE_MARKS).items():
            if self.settings.get(key) is None:
                named += [self.ids[name] for name in names if name in self.ids]
        return found | {idx: CONTROL for idx in named if self.types[idx] != USER_DEFINED}

    def end_ids(self) -> list[int]:
        """Tokens that end a reply, in order: those of the keys for ends, and of the known names."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id", *_CODE_ENDS)
        found = {idx for key in keys if (idx := self.token_id(key)) is not None}
        found |= set(self._named_ends())
        for key, names in _CODE_ENDS.items():
            if self.settings.get(key) is None:
                found |= {self.ids[name] for name in names if name in self.ids}
        if self.kind == "llama" and self.settings.get("eos_token_id") is None and len(self.tokens) > 2:
            found.add(2)
        # One turn of several channels goes on after `<|end|>` (gpt-oss, solar-open).
        if self._has("<|return|>", "<|call|>", "<|end|>") or (
            self._has("<|flush|>", "<|end|>") and (self._has("<|call|>") or self._has("<|calls|>"))
        ):
            found.discard(self.ids["<|end|>"])
        return sorted(found)

    def _named_ends(self) -> list[int]:
        """`</s>` is one where it is no normal token: for Qwen it is a tag of HTML (where llama.cpp ends a reply)."""
        found = [self.ids[name] for name in END_NAMES if name in self.ids]
        html = self.ids.get("</s>")
        return [idx for idx in found if idx != html or self.types[idx] in (UNKNOWN, CONTROL, USER_DEFINED)]

    def _has(self, *names: str) -> bool:
        return all(name in self.ids for name in names)


def read_vocabulary(path: Path) -> Vocabulary | None:
    """The vocabulary of a GGUF file, or of the first part of a split one that has it; None where there is none.

    Raises CheckpointError for metadata that cannot be.
    """
    num_rows: int | None = None
    found: tuple[GgufHeader, dict[str, Any]] | None = None
    for part in split_paths(path):
        file = ShardFile(part)
        try:
            header = read_gguf_header(file, file_idx=0)
            if found is None and f"{_PREFIX}tokens" in header.metadata:
                found = header, _read_lists(file, header)
        finally:
            file.close()
        embedding = header.tensors.get("token_embd.weight")
        num_rows = embedding.shape[0] if embedding is not None else num_rows
        if found is not None and num_rows is not None:
            break
    return None if found is None else _checked(path, *found, num_rows)


def _read_lists(file: ShardFile, header: GgufHeader) -> dict[str, Any]:
    lists: dict[str, Any] = {}
    for name, is_text in (("tokens", True), ("token_type", False), ("scores", False), ("merges", True)):
        value = header.metadata.get(f"{_PREFIX}{name}", [])
        if isinstance(value, Skipped):
            value = _read_list(file, value)
        is_list = isinstance(value, (list, array))
        if not is_list or any(isinstance(item, str) != is_text for item in value[:1]):
            raise CheckpointError(f"{file.path} has {_PREFIX}{name} that is no list of {_items(is_text)}")
        lists[name] = value
    return lists


def _items(is_text: bool) -> str:
    return "texts" if is_text else "numbers"


def _read_list(file: ShardFile, skipped: Skipped) -> list[str] | array[Any]:
    data = bytearray(skipped.num_bytes)
    file.read_into(memoryview(data), skipped.start, need_bytes=skipped.num_bytes)
    if skipped.form is not None:
        return array(skipped.form[1].replace("?", "B"), bytes(data))
    texts, at, unpack = [], 0, _LENGTH.unpack_from
    try:
        for _ in range(skipped.num_items):
            end = at + 8 + unpack(data, at)[0]
            texts.append(data[at + 8 : end].decode())
            at = end
    except UnicodeDecodeError:
        raise CheckpointError(
            f"{file.path} has a token or merge that is no UTF-8 (number {len(texts)}); it was converted wrongly: get "
            "another file of the model"
        ) from None
    assert at == skipped.num_bytes <= MAX_TEXT_BYTES * skipped.num_items, f"{at=} {skipped=}"
    return texts


def _checked(path: Path, header: GgufHeader, lists: dict[str, Any], num_rows: int | None) -> Vocabulary:
    metadata = header.metadata
    kind, splitting = metadata.get(f"{_PREFIX}model"), metadata.get(f"{_PREFIX}pre")
    if not isinstance(kind, str) or not isinstance(splitting, (str, type(None))):
        raise CheckpointError(f"{path} says {_PREFIX}model {kind!r}, {_PREFIX}pre {splitting!r}; names are needed")
    tokens = [token or f"[EMPTY_{idx}]" for idx, token in enumerate(lists["tokens"])]
    count = len(tokens)
    ids = {token: idx for idx, token in enumerate(tokens)}
    if len(ids) < count:
        idx = next(idx for idx, token in enumerate(tokens) if ids[token] != idx)
        raise CheckpointError(
            f"{path} has the token {tokens[idx]!r} twice, as {idx} and {ids[tokens[idx]]}; it was converted wrongly: "
            "get another file of the model"
        )
    if num_rows is not None and count > num_rows:
        raise CheckpointError(
            f"{path} has a vocabulary of {count} tokens, its token_embd.weight has {num_rows} rows; it was converted "
            "wrongly: get another file of the model"
        )
    for name in ("token_type", "scores"):
        if lists[name] and len(lists[name]) < count:
            raise CheckpointError(f"{path} has {len(lists[name])} items of {_PREFIX}{name} for {count} tokens")
    settings = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    return Vocabulary(
        path=path, kind=kind, splitting=splitting or None, tokens=tokens, ids=ids,
        types=lists["token_type"][:count] or [NORMAL] * count, scores=lists["scores"], merges=lists["merges"],
        settings=settings, chat_template=_chat_template(metadata), num_rows=num_rows,
        model_name=str(metadata.get("general.name", "")),
    )  # fmt: skip


def _chat_template(metadata: dict[str, Any]) -> str | dict[str, str] | None:
    key = "tokenizer.chat_template"
    main = metadata.get(key)
    named = {
        name.removeprefix(f"{key}."): text
        for name, text in metadata.items()
        if name.startswith(f"{key}.") and isinstance(text, str)
    }
    if isinstance(main, str) and main:
        return main
    return named or None
