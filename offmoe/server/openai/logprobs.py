"""Log probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offmoe.sampling.logprobs import Logprob, TokenLogprobs

Decode = Any  # a tokenizer


class TokenNames:
    """Texts of single tokens; a token that is part of a character has only bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        """The text of a token as it stands within a sentence."""
        if token_id not in self._known:
            self._known[token_id] = self._spell(token_id)
        return self._known[token_id]

    def _spell(self, token_id: int) -> str:
        if self._tokenizer is None:
            return str(token_id)
        # Between two others, a token keeps the space that it begins with.
        anchor = self._tokenizer.encode("a", add_special_tokens=False)
        alone = self._tokenizer.decode(anchor, skip_special_tokens=False)
        both = self._tokenizer.decode([*anchor, token_id], skip_special_tokens=False)
        return str(both[len(alone) :])


def chat_logprobs(ids: Sequence[int], found: Sequence[TokenLogprobs], names: TokenNames) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat's choice."""
    return [
        {
            **_entry(token_id, of[token_id], names),
            "top_logprobs": [_entry(other, of[other], names) for other in _top(of)],
        }
        for token_id, of in zip(ids, found, strict=True)
        if token_id in of
    ]


def _entry(token_id: int, value: Logprob, names: TokenNames) -> dict[str, Any]:
    name = names(token_id)
    return {"token": name, "logprob": value.logprob, "bytes": list(name.encode())}


def _top(found: TokenLogprobs) -> list[int]:
    """Ids by rank, without a chosen one that is not among the likeliest."""
    ranked = sorted(found, key=lambda token_id: found[token_id].rank)
    return [token_id for place, token_id in enumerate(ranked, start=1) if found[token_id].rank <= max(place, 1)]


class CompletionLogprobs:
    """`logprobs` of a completion's choice: lists that have an entry a token. `num_top`: of the likeliest."""

    def __init__(self, names: TokenNames, num_top: int) -> None:
        self._names, self._num_top = names, num_top
        self._offset = 0

    def of(self, ids: Sequence[int], found: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Lists for these tokens, which come after those of the last call."""
        tokens, values, tops, offsets = [], [], [], []
        for token_id, of in zip(ids, found, strict=True):
            name = self._names(token_id)
            tokens.append(name)
            offsets.append(self._offset)
            self._offset += len(name)
            values.append(of[token_id].logprob if of and token_id in of else None)
            tops.append({self._names(other): of[other].logprob for other in of} if of else None)
        return {
            "tokens": tokens, "token_logprobs": values, "top_logprobs": tops if self._num_top else None,
            "text_offset": offsets,
        }  # fmt: skip
