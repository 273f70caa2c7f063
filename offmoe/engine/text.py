"""Ids to text while they come: incremental decoding, and stop strings that may be cut across pieces."""

from __future__ import annotations

from collections.abc import Sequence

from offmoe.chat.control_tokens import control_tokens
from offmoe.hf.door import PreTrainedTokenizerBase
from offmoe.hf.tokens.tokenizing import tokenizing

_REPLACEMENT = "\ufffd"
# Tokens that wait for the end of a character, at most: no text has that many bytes without one.
_MOST_WAITING = 64
# Ids of the prompt among which the begin of a character, or a word with its space, is looked for.
_TAIL_TOKENS = 16


class TextDecoder:
    """Turns ids into text as they come; incomplete characters wait for the ids that complete them.

    Tokenizers look back: sentencepiece drops the space before the first word of a text, and letters may be spelt in
    several tokens. So ids are decoded after those that gave the last piece of text, which end with a whole character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, after: Sequence[int] = ()) -> None:
        """`after`: the ids whose text is continued; empty for a text of its own."""
        self._tokenizer = tokenizer
        self._control = control_tokens(tokenizer)
        self._waiting: list[int] = []
        self._context = self._end_of(after)
        # A character that the prompt began belongs to what completes it.
        self._context_text = self._decode(self._context).rstrip(_REPLACEMENT)

    def spelling(self, token_id: int) -> str:
        """The letters of a control token, which are no text; empty for any other token."""
        return self._control.get(token_id, "")

    def add(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete, and for control tokens."""
        if token_id in self._control:
            return ""
        self._waiting.append(token_id)
        text = self._text_of_waiting()
        if len(self._waiting) < _MOST_WAITING and (not text or text.endswith(_REPLACEMENT)):
            return ""
        self._context, self._waiting = self._end_of(self._context + self._waiting), []
        self._context_text = self._decode(self._context)
        return text

    def flush(self) -> str:
        """Text that is left at the end, incomplete characters included."""
        text = self._text_of_waiting()
        self._waiting = []
        return text

    def _text_of_waiting(self) -> str:
        if not self._waiting:
            return ""
        text = self._decode(self._context + self._waiting)
        # Bytes that are no character may turn those before them into replacements: then without these.
        if not text.startswith(self._context_text):
            return self._decode(self._waiting)
        return text[len(self._context_text) :]

    def _end_of(self, ids: Sequence[int]) -> list[int]:
        """The fewest last ids that have a text, and begin with a whole character."""
        tail = [token_id for token_id in ids[-2 * _TAIL_TOKENS :] if token_id not in self._control][-_TAIL_TOKENS:]
        for num in range(1, len(tail) + 1):
            text = self._decode(tail[-num:])
            if text and not text.startswith(_REPLACEMENT):
                return tail[-num:]
        return tail

    def _decode(self, ids: list[int]) -> str:
        with tokenizing("the model"):
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


class StopMatcher:
    """Cuts text at the first stop string, holding back what might be the beginning of one.

    Control tokens take part in the search by their spelling, and are never shown.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        # The characters of `_held` that are text, and not a control token's spelling.
        self._is_text: list[bool] = []
        # The stop string that was met.
        self.met: str | None = None

    def add(self, text: str, *, control: str = "") -> str:
        """The part of held-back plus new text that may be shown; sets `met` when it has a stop string.

        `control`: the spelling of a control token that comes after `text`.
        """
        if not self._stops:
            return text
        self._held += text + control
        self._is_text += [True] * len(text) + [False] * len(control)
        found = [(position, stop) for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            first, self.met = min(found)
            shown = self._take(first)
            self._take(len(self._held))
            return shown
        return self._take(len(self._held) - max(self._overlap(stop) for stop in self._stops))

    def flush(self) -> str:
        """Text that was held back, when no more text comes."""
        return self._take(len(self._held))

    def _take(self, num: int) -> str:
        shown = "".join(
            character for character, is_text in zip(self._held[:num], self._is_text, strict=False) if is_text
        )
        self._held, self._is_text = self._held[num:], self._is_text[num:]
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
