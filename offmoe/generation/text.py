"""Ids to text while they come: incremental decoding, and stop strings that may be cut across pieces."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
# Tokens decoded together. Decoding from the start at every step would be quadratic; a window of this many keeps what
# precedes a token in view, which is all that tokenizers look back at.
_WINDOW_TOKENS = 64
_KEPT_TOKENS = 8


class TextDecoder:
    """Turns ids into text as they come; incomplete characters wait for the ids that complete them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT):
            return ""
        new, self._shown = text[len(self._shown) :], text
        if len(self._ids) > _WINDOW_TOKENS:
            self._ids = self._ids[-_KEPT_TOKENS:]
            self._shown = self._decode(self._ids)
        return new

    def flush(self) -> str:
        """What is left at the end, incomplete characters included."""
        text = self._decode(self._ids)
        new, self._shown = text[len(self._shown) :], text
        return new

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


class StopMatcher:
    """Cuts text at the first stop string, holding back what might be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The part of held-back plus new text that may be shown; sets `stopped` when a stop string was met."""
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
