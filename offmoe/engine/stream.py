"""Text as it comes, with the reason for its end and what it cost: generate_step plus text, clock and counters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from offmoe.core.counters import Counters
from offmoe.engine.stats import GenerationStats
from offmoe.engine.text import StopMatcher, TextDecoder


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of a stream. `text` may be empty (an incomplete character, a stop string that may be beginning).

    `token_id` is None for the text that only the end released, and for the first part of a token's text that goes from
    reasoning to answer. `reasoning`: not yet the answer (chats only). The last piece, and only it, has `finish_reason`
    ("stop": end token or stop string, "length": max_new_tokens, "context": the context is full) and `stats`.
    """

    text: str
    token_id: int | None = None
    finish_reason: str | None = None
    stats: GenerationStats | None = None
    reasoning: bool = False


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """When a stream ends. `limit_reason` names what `max_new_tokens` stands for."""

    end_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    max_new_tokens: int
    limit_reason: str


def stream_text(
    steps: Iterator[int], tokenizer: PreTrainedTokenizerBase | None, rules: StopRules, counters: Counters,
    *, num_prompt_tokens: int, num_reused: int = 0, clock: Callable[[], float] = time.perf_counter,
    on_end: Callable[[GenerationStats], None] = lambda stats: None,
    after: Sequence[int] = (), way: Callable[[], tuple[str, str]] = lambda: ("", ""),
) -> Iterator[Piece]:  # fmt: skip
    """Pieces of text for the ids of `steps`, until a rule ends them. Without a tokenizer, pieces have ids only.

    `num_reused` of the prompt's tokens were in the KV cache already. `on_end` is told what it cost, also when it is
    broken off. `after`: ids whose text the reply continues. `way`: the last
    token's decode path and its reason.
    """
    decoder = TextDecoder(tokenizer, after=after) if tokenizer is not None else None
    stops = StopMatcher(rules.stop_strings)
    meter = Meter(counters, num_prompt_tokens, num_reused, clock, way)
    reason = rules.limit_reason
    try:
        for token_id in steps:
            meter.token()
            if token_id in rules.end_ids:
                reason = "stop"
                break
            text = stops.add(decoder.add(token_id), control=decoder.spelling(token_id)) if decoder else ""
            yield Piece(text, token_id)
            if stops.stopped:
                break
            if meter.num_tokens >= rules.max_new_tokens:
                break
    finally:
        on_end(meter.stats())
    rest = "" if stops.stopped or decoder is None else stops.add(decoder.flush())
    yield Piece(rest + stops.flush(), None, "stop" if stops.stopped else reason, meter.stats())


class Meter:
    """Times of tokens and the counters of the two phases. Made when the prompt starts."""

    def __init__(
        self, counters: Counters, num_prompt_tokens: int, num_reused: int, clock: Callable[[], float],
        way: Callable[[], tuple[str, str]] = lambda: ("", ""),
    ) -> None:  # fmt: skip
        self._counters, self._num_prompt_tokens, self._clock = counters, num_prompt_tokens, clock
        self._num_reused, self._way = num_reused, way
        self._times = [clock()]
        self._at_start = counters.copy()
        self._at_first = self._at_start

    @property
    def num_tokens(self) -> int:
        """Tokens counted so far."""
        return len(self._times) - 1

    def token(self) -> None:
        """A token has come."""
        self._times.append(self._clock())
        if self.num_tokens == 1:
            self._at_first = self._counters.copy()

    def stats(self) -> GenerationStats:
        """Statistics up to now."""
        times, (path, reason) = self._times, self._way()
        return GenerationStats(
            prompt_tokens=self._num_prompt_tokens,
            reused_tokens=self._num_reused,
            new_tokens=self.num_tokens,
            prefill_s=times[1] - times[0] if self.num_tokens else 0.0,
            step_s=tuple(after - before for before, after in zip(times[1:-1], times[2:], strict=True)),
            prefill=self._at_first.minus(self._at_start),
            decode=self._counters.copy().minus(self._at_first),
            decode_path=path,
            decode_path_reason=reason,
        )
