"""A chat model's reasoning told apart from its answer: `<think>` blocks, and the channels of gpt-oss.

Works on the text as it comes. A mark that is a special token is not in the text: it is put back for this purpose by its
id. A block of reasoning is known at the begin of a reply only: later, `<think>` is something that the model speaks of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from offmoe.chat.control_tokens import REASONING_TAGS as TAGS
from offmoe.chat.template import template_text
from offmoe.hf.door import PreTrainedTokenizerBase

_CHANNEL, _MESSAGE, _START, _END = "<|channel|>", "<|message|>", "<|start|>", "<|end|>"
_ANSWER_CHANNEL = "final"
# Ids at the end of a prompt among which a template may have opened the block itself.
_TAIL_TOKENS = 16

Part = tuple[bool, str]  # (is reasoning, text)


class Splitter(Protocol):
    """`add` returns what is certain by now, `flush` the rest; texts are never empty."""

    def add(self, text: str) -> list[Part]:
        """Parts that `text` completes."""

    def flush(self) -> list[Part]:
        """Parts that were held back."""


class TagSplitter:
    """`<think>reasoning</think>answer`; blank lines around the marks belong to neither."""

    def __init__(self, *, inside: tuple[str, str] | None = None) -> None:
        """`inside`: the pair of marks whose first one was the end of the prompt."""
        self._close = inside[1] if inside else ""
        self._begun = inside is not None
        self._held, self._trim = "", True

    def add(self, text: str) -> list[Part]:
        """See Splitter."""
        self._held += text
        parts: list[Part] = []
        if not self._begun and not self._begin():
            return parts
        if self._close:
            before, found, after = self._held.partition(self._close)
            keep = 0 if found else _overlap(before, self._close)
            self._give(parts, True, before[: len(before) - keep])
            self._held = after if found else before[len(before) - keep :]
            if not found:
                return parts
            self._close, self._trim = "", True
        self._give(parts, False, self._held)
        self._held = ""
        return parts

    def flush(self) -> list[Part]:
        """See Splitter."""
        parts: list[Part] = []
        self._give(parts, bool(self._close), self._held)
        self._held = ""
        return parts

    def _begin(self) -> bool:
        """False while the text so far may be the begin of a mark."""
        begin = self._held.lstrip()
        if not begin or any(mark != begin and mark.startswith(begin) for mark, _ in TAGS):
            return False
        self._begun = True
        for mark, close in TAGS:
            if begin.startswith(mark):
                self._held, self._close = begin[len(mark) :], close
        self._trim = bool(self._close)
        return True

    def _give(self, parts: list[Part], reasoning: bool, text: str) -> None:
        if self._trim:
            text = text.lstrip("\n")
        if text:
            self._trim = False
            parts.append((reasoning, text))


class ChannelSplitter:
    """`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`, as gpt-oss writes."""

    def __init__(self) -> None:
        self._held, self._channel = "", _ANSWER_CHANNEL
        self._in_header = False

    def add(self, text: str) -> list[Part]:
        """See Splitter."""
        self._held += text
        parts: list[Part] = []
        while (found := _first_mark(self._held)) is not None:
            position, mark = found
            before, self._held = self._held[:position], self._held[position + len(mark) :]
            self._give(parts, before)
            if mark == _MESSAGE:
                self._in_header = False
            elif mark != _END:
                self._in_header, self._channel = True, "" if mark == _CHANNEL else _ANSWER_CHANNEL
        keep = max(_overlap(self._held, mark) for mark in (_CHANNEL, _MESSAGE, _START, _END))
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        self._give(parts, text)
        return parts

    def flush(self) -> list[Part]:
        """See Splitter."""
        parts: list[Part] = []
        self._give(parts, self._held)
        self._held = ""
        return parts

    def _give(self, parts: list[Part], text: str) -> None:
        if self._in_header:
            self._channel += text if self._channel != _ANSWER_CHANNEL else ""
        elif text:
            parts.append((self._channel.strip() not in {_ANSWER_CHANNEL, ""}, text))


def make_splitter(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]
) -> tuple[Splitter, dict[int, str]]:  # fmt: skip
    """The splitter for a reply to `prompt_ids`, and the marks that are special tokens, by their ids."""
    splitter: Splitter
    if _CHANNEL in template_text(tokenizer):
        splitter, marks = ChannelSplitter(), [_CHANNEL, _MESSAGE, _START, _END]
    else:
        splitter, marks = TagSplitter(inside=_left_open(tokenizer, prompt_ids)), [m for pair in TAGS for m in pair]
    return splitter, {id_: mark for mark in marks if (id_ := _special_id(tokenizer, mark)) is not None}


def _left_open(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> tuple[str, str] | None:
    """The marks of the block that the prompt ends in."""
    tail = tokenizer.decode(list(prompt_ids[-_TAIL_TOKENS:]), skip_special_tokens=False)
    assert isinstance(tail, str)
    return next((pair for pair in TAGS if tail.rstrip().endswith(pair[0])), None)


def _special_id(tokenizer: PreTrainedTokenizerBase, mark: str) -> int | None:
    """The id of a mark that decoding leaves out."""
    return next(
        (id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special and str(token) == mark), None
    )


def _first_mark(text: str) -> tuple[int, str] | None:
    found = [(position, mark) for mark in (_CHANNEL, _MESSAGE, _START, _END) if (position := text.find(mark)) >= 0]
    return min(found, default=None)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`, but is not all of it."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


class ReasoningGate:
    """Says which tokens of a reply are still reasoning, so that a grammar begins with the answer. For one reply."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer, self._ids = tokenizer, list[int]()
        opened = _left_open(tokenizer, prompt_ids)
        has_channels = _CHANNEL in template_text(tokenizer)
        self._until = _CHANNEL + _ANSWER_CHANNEL + _MESSAGE if has_channels else opened[1] if opened else ""
        pairs = [] if self._until else TAGS
        vocabulary = tokenizer.get_vocab()
        self._closers = {vocabulary[mark]: close for mark, close in pairs if mark in vocabulary}
        self._openers = frozenset(self._closers)

    @property
    def openers(self) -> frozenset[int]:
        """Tokens that may begin a block of reasoning, while nothing was said yet."""
        return self._openers

    @property
    def is_reasoning(self) -> bool:
        """The tokens that come next are no answer."""
        return bool(self._until)

    def add(self, token_id: int) -> bool:
        """Whether this token of the reply is the answer's."""
        closer, self._closers, self._openers = self._closers.get(token_id), {}, frozenset()
        if closer is not None:
            self._until = closer
            return False
        if not self._until:
            return True
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids[-_TAIL_TOKENS:], skip_special_tokens=False)
        assert isinstance(text, str)
        if self._until in text:
            self._until = ""
        return False
