"""Text as it comes, with the reason for its end and what it cost: generate_step plus text, clock and counters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from offmoe.core.counters import Counters
from offmoe.engine.stats import GenerationStats
from offmoe.engine.text import StopMatcher, TextDecoder
from offmoe.hf.door import PreTrainedTokenizerBase
from offmoe.sampling.logprobs import TokenLogprobs

FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step of a stream: the text that it completes, and the token that it took.

    text           may be empty: an incomplete character, or a stop string that may be beginning
    token_ids      one id; none for text that only the end releases, and for the first part of a token's text that goes
                   from reasoning to answer
    finish_reason  None until the last chunk: "stop" (end token, stop_token_ids or stop string) or "length"
                   (max_new_tokens, or the context is full)
    stop_reason    the stop string or the one of stop_token_ids that ended the reply; None for the model's end token
    logprobs       for each of token_ids, if they were asked for: token id to log probability and rank
    prompt_logprobs  in the first chunk, if they were asked for: the same for every token of the prompt; None for its
                   first one
    stats          in the last chunk: the cost of the reply
    reasoning      the text is not the answer yet (chats only)
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    stats: GenerationStats | None = None
    reasoning: bool = False


class StreamClosed(Exception):  # noqa: N818 - an end, and no error
    """Raised inside of a reply whose stream was closed while its prompt was read. No caller sees it."""


class Stream(Iterator[Chunk]):
    """The chunks of one reply. The first `next` begins it; it holds the engine until its end or `close`.

    Leaving a `with` statement closes it. `close` may be called from another thread while the stream waits for a token.
    """

    def __init__(
        self, chunks: Generator[Chunk, None, None], closed: threading.Event | None = None, *,
        prompt_ids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """`closed` tells who makes the chunks that nobody waits for them; one for all streams around one reply."""
        self._chunks = chunks
        # What the reply answers.
        self.prompt_ids = tuple(prompt_ids)
        self.closed = closed or threading.Event()

    def __next__(self) -> Chunk:
        try:
            chunk = next(self._chunks)
        except StreamClosed:
            raise StopIteration from None
        if self.closed.is_set():  # by another thread, meanwhile
            self._chunks.close()
            raise StopIteration
        return chunk

    @property
    def is_closed(self) -> bool:
        """Nobody waits for the rest; false for a stream that came to its end."""
        return self.closed.is_set()

    def close(self) -> None:
        """End the reply at its next token, or in its prompt after the layer at work, and free the engine.

        A second close does nothing.
        """
        self.closed.set()
        try:
            self._chunks.close()
        except ValueError as error:
            if "already executing" not in str(error):
                raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """The ends of a stream. `stop_token_ids` and `stop_strings` are the caller's, `end_ids` the model's own."""

    end_ids: frozenset[int]
    stop_token_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    max_new_tokens: int


def stream_text(
    steps: Iterator[int], tokenizer: PreTrainedTokenizerBase | None, rules: StopRules, counters: Counters,
    *, num_prompt_tokens: int, num_reused: int = 0, clock: Callable[[], float] = time.perf_counter,
    on_end: Callable[[GenerationStats], None] = lambda stats: None,
    after: Sequence[int] = (), way: Callable[[], tuple[str, str]] = lambda: ("", ""),
    logprobs: Callable[[], TokenLogprobs] | None = None,
    prompt_logprobs: Callable[[], tuple[TokenLogprobs | None, ...] | None] | None = None, began: float | None = None,
) -> Generator[Chunk, None, None]:  # fmt: skip
    """Chunks of text for the ids of `steps`, until a rule ends them. Without a tokenizer, chunks have ids only.

    `num_reused` of the prompt's tokens were in the KV cache already. `on_end` is told what it cost, also when it is
    broken off. `after`: ids whose text the reply continues. `way`: the last token's decode path and its reason.
    `logprobs`: those of the last token. `prompt_logprobs`: those of the prompt, asked for once it was read.
    `began`: the clock when the request did, if that is not now.
    """
    decoder = TextDecoder(tokenizer, after=after) if tokenizer is not None else None
    stops = StopMatcher(rules.stop_strings)
    meter = Meter(counters, num_prompt_tokens, num_reused, clock, way, began=began)
    reason: FinishReason = "length"
    stop_reason: int | str | None = None
    of_prompt: tuple[TokenLogprobs | None, ...] | None = None
    try:
        for token_id in steps:
            meter.token()
            of_prompt = prompt_logprobs() if prompt_logprobs is not None and meter.num_tokens == 1 else None
            if rules.max_new_tokens == 0:
                meter.is_prompt_only = True
                break
            if token_id in rules.stop_token_ids or token_id in rules.end_ids:
                reason, stop_reason = "stop", token_id if token_id in rules.stop_token_ids else None
                break
            text = stops.add(decoder.add(token_id), control=decoder.spelling(token_id)) if decoder else ""
            found = None if logprobs is None else (logprobs(),)
            yield Chunk(text, (token_id,), logprobs=found, prompt_logprobs=of_prompt)
            of_prompt = None
            if stops.met is not None or meter.num_tokens >= rules.max_new_tokens:
                break
    finally:
        on_end(meter.stats())
    rest = "" if stops.met is not None or decoder is None else stops.add(decoder.flush())
    if stops.met is not None:
        reason, stop_reason = "stop", stops.met
    none = None if logprobs is None else ()
    yield Chunk(
        rest + stops.flush(), finish_reason=reason, stop_reason=stop_reason, logprobs=none, prompt_logprobs=of_prompt,
        stats=meter.stats(),
    )  # fmt: skip


class Meter:
    """Times of tokens and the counters of the two phases. Made when the prompt starts."""

    def __init__(
        self, counters: Counters, num_prompt_tokens: int, num_reused: int, clock: Callable[[], float],
        way: Callable[[], tuple[str, str]] = lambda: ("", ""), began: float | None = None,
    ) -> None:  # fmt: skip
        self._counters, self._num_prompt_tokens, self._clock = counters, num_prompt_tokens, clock
        self._num_reused, self._way = num_reused, way
        self._times = [clock() if began is None else began]
        self._at_start = counters.copy()
        self._at_first = self._at_start
        # The first token was asked for its time only.
        self.is_prompt_only = False

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
            new_tokens=0 if self.is_prompt_only else self.num_tokens,
            prefill_s=times[1] - times[0] if self.num_tokens else 0.0,
            step_s=tuple(after - before for before, after in zip(times[1:-1], times[2:], strict=True)),
            prefill=self._at_first.minus(self._at_start),
            decode=self._counters.copy().minus(self._at_first),
            decode_path=path,
            decode_path_reason=reason,
        )
