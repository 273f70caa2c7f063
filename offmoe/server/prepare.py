"""A checked request on its way through the engine: streams that were made before the queue, and what reads them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

from offmoe.engine.engine import Engine
from offmoe.engine.stats import GenerationStats
from offmoe.engine.stream import Chunk, Stream
from offmoe.sampling.params import PrefillProgress
from offmoe.server.errors import ApiError
from offmoe.server.events import Event, PromptRead, ReplyEnd, TextDelta
from offmoe.server.jobs import ServerJob


class ReplyReader(Protocol):
    """From chunks of the engine to events of one reply."""

    def add(self, chunk: Chunk) -> Iterator[Event]:
        """Events of a chunk."""

    def end(self) -> Iterator[Event]:
        """Events that were held back; the last call."""

    @property
    def calls_tools(self) -> bool:
        """The reply has called a tool."""

    @property
    def is_complete(self) -> bool:
        """No more of the reply is wanted."""


class Generation:
    """Replies of a request. `add` them off the engine's thread, where each is checked; `run` is called on it.

    `after_token` is called at each step, `on_end` with each finished reply.
    """

    def __init__(
        self, engine: Engine, *, timeout_s: float | None = None, after_token: Callable[[], None] = lambda: None,
        on_end: Callable[[ReplyEnd], None] = lambda end: None,
    ) -> None:  # fmt: skip
        self.engine = engine
        self._timeout_s, self._after_token, self._on_end = timeout_s, after_token, on_end
        self._replies: list[tuple[Stream, ReplyReader]] = []
        self._job: ServerJob | None = None
        self._deadline: float | None = None

    def add(self, stream: Stream, reader: ReplyReader) -> None:
        """A reply, made with `on_progress` of this and `queued`."""
        self._replies.append((stream, reader))

    def on_progress(self, progress: PrefillProgress) -> None:
        """For the engine: the prompt was read so far."""
        assert self._job is not None
        self._job.emit(PromptRead(
            progress.done_tokens, progress.total_tokens, progress.reused_tokens, progress.disk_bytes,
            progress.elapsed_s,
        ))  # fmt: skip
        self._after_token()
        if self._is_late():
            raise ApiError(
                408, f"reading the prompt took more than {self._timeout_s:g} s", kind="timeout_error", code="timeout"
            )

    def run(self, job: ServerJob) -> None:
        """Emit every reply's events, in their order. Raises what the engine raises."""
        assert job.begun is not None
        self._job = job
        self._deadline = None if self._timeout_s is None else job.begun + self._timeout_s
        try:
            for index, (stream, reader) in enumerate(self._replies):
                if job.is_cancelled:
                    return
                end = replace(self._reply(job, index, stream, reader), queue_s=job.begun - job.created)
                self._on_end(end)
                job.emit(end)
        finally:
            for stream, _ in self._replies:
                stream.close()

    def _reply(self, job: ServerJob, index: int, stream: Stream, reader: ReplyReader) -> ReplyEnd:
        reason: str = "length"
        stop_reason: int | str | None = None
        stats: GenerationStats | None = None
        num_tokens = num_reasoning = 0
        job.ends_by(stream.close)
        for chunk in stream:
            for event in reader.add(chunk):
                job.emit(event)
                if isinstance(event, TextDelta) and event.reasoning:
                    num_reasoning += len(event.token_ids)
            num_tokens += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                reason, stop_reason, stats = chunk.finish_reason, chunk.stop_reason, chunk.stats
            self._after_token()
            if reader.is_complete or self._is_late():
                stream.close()
        for event in reader.end():
            job.emit(event)
        if reader.calls_tools and (reason == "stop" or reader.is_complete):
            reason = "tool_calls"
        return ReplyEnd(
            index, reason, stop_reason, stats, num_tokens if stats is None else stats.new_tokens, num_reasoning
        )

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline


class PlainReader:
    """A reply as the engine tells it: text, and in a chat reasoning."""

    calls_tools = is_complete = False

    def __init__(self, index: int) -> None:
        self._index = index

    def add(self, chunk: Chunk) -> Iterator[Event]:
        """See ReplyReader."""
        if chunk.text or chunk.token_ids or chunk.prompt_logprobs is not None:
            yield TextDelta(
                self._index, chunk.text, chunk.reasoning, chunk.token_ids, chunk.logprobs, chunk.prompt_logprobs
            )

    def end(self) -> Iterator[Event]:
        """See ReplyReader."""
        return iter(())
