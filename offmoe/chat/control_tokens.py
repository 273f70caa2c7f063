"""A tokenizer's control tokens: what structures a conversation, and is not text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from offmoe.core.errors import UsageError
from offmoe.hf.door import PreTrainedTokenizerBase

# What opens a block of reasoning, and what ends it.
REASONING_TAGS = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
)  # fmt: skip
REASONING_MARKS = frozenset(mark for pair in REASONING_TAGS for mark in pair)
_IMPOSSIBLE = (
    "cannot be written as text with this tokenizer; leave it out, or use allow_control_tokens (--allow-control-tokens)"
)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Ids and spellings of the tokens that decoding leaves out of a text. Not those that are only kept whole, such as
    Qwen's `<think>`.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {int(token_id): str(token) for token_id, token in added.items() if token.special and str(token)}


def spelling_pattern(spellings: list[str]) -> re.Pattern[str] | None:
    """Matches any of `spellings`, the longest where several begin; None for no spellings."""
    longest_first = sorted(set(spellings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


class HiddenTokens:
    """Control tokens that stand in somebody's words, taken out before a template is rendered and put back as text.

    While they are out, a mark with a number stands for each, made of a character that occurs nowhere else.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._spellings = spelling_pattern(list(control_tokens(tokenizer).values()))
        self._mark = ""
        self._hidden: list[str] = []

    def hide(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The same messages without control tokens in any of their texts.

        What a model wrote itself keeps the marks of its reasoning, by which templates cut it off.
        """
        self._mark, self._hidden = unused_character("".join(_texts(messages))), []
        return [
            {
                key: value if key == "role" else self._without(value, message.get("role") == "assistant")
                for key, value in message.items()
            }
            for message in messages
        ]

    def _without(self, value: Any, is_own: bool) -> Any:
        if isinstance(value, dict):
            return {key: self._without(inner, is_own) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._without(inner, is_own) for inner in value]
        if not isinstance(value, str) or self._spellings is None:
            return value

        def take(match: re.Match[str]) -> str:
            if is_own and match[0] in REASONING_MARKS:
                return match[0]
            self._hidden.append(match[0])
            return f"{self._mark}{len(self._hidden) - 1}{self._mark}"

        return self._spellings.sub(take, value)

    def encode(self, rendered: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a rendered prompt, in which what was hidden is text.

        Without anything hidden, exactly the tokenizer's own ids. Raises UsageError where a tokenizer has no way to
        write a control token as text.
        """
        if not self._hidden:
            return list(self._tokenizer(rendered, add_special_tokens=add_special_tokens)["input_ids"])
        return _encode_renamed(self._tokenizer, rendered, self._put_back, add_special_tokens=add_special_tokens)

    def _put_back(self, text: str) -> str:
        return re.sub(f"{self._mark}(\\d+){self._mark}", lambda match: self._hidden[int(match[1])], text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def unused_character(text: str) -> str:
    """A character of Unicode's last private plane that `text` has not."""
    return next(chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in text)


def _encode_renamed(
    tokenizer: PreTrainedTokenizerBase, rendered: str, put_back: Callable[[str], str], *, add_special_tokens: bool
) -> list[int]:
    """Encode with a tokenizer whose control tokens have other names, which only the prompt's structure is given.

    It shares the model, normalizer and splitting rule of the original, so that text is cut in the same places. Its
    added tokens get ids of their own and are found by name.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"a control token in a message {_IMPOSSIBLE}")
    mark = unused_character(rendered + put_back(rendered))
    renamed = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(backend, part) is not None:
            setattr(renamed, part, getattr(backend, part))
    added = sorted(backend.get_added_tokens_decoder().items())
    id_of: dict[str, int] = {}
    for token_id, token in added:
        name = f"{mark}{token.content}{mark}" if token.special else token.content
        id_of[name] = token_id
        renamed.add_tokens([
            AddedToken(
                name, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
                normalized=token.normalized, special=token.special,
            )
        ])  # fmt: skip
    found = spelling_pattern([token.content for _, token in added])
    special = {token.content for _, token in added if token.special}
    assert found is not None, "something was hidden, so there are control tokens"
    text = found.sub(lambda match: f"{mark}{match[0]}{mark}" if match[0] in special else match[0], rendered)
    encoding = renamed.encode(put_back(text), add_special_tokens=add_special_tokens)
    ids = [id_of.get(token, token_id) for token, token_id in zip(encoding.tokens, encoding.ids, strict=True)]
    control = {token_id for token_id, token in added if token.special} - {tokenizer.unk_token_id}
    for token, token_id, is_around in zip(encoding.tokens, ids, encoding.special_tokens_mask, strict=True):
        if token_id in control and token not in id_of and not is_around:
            raise UsageError(f"{token!r} in a message {_IMPOSSIBLE}")
    return ids
