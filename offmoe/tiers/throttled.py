"""A link of a set speed, played by a thread: overlap, late arrivals and cancellation can be tested without a device.

Concurrency. One thread carries one chunk at a time, those of urgent copies first, otherwise in the order of `copy()`.
A chunk's bytes are written at the *end* of its simulated transfer, so a reader that did not wait sees old bytes, as on
real hardware. A chunk that has begun runs to its end; those of a cancelled copy that have not never write. Host memory
has no work in flight, so a mark is nothing.

The link is busy from the later of "the copy was asked for" and "the chunk before ended", for exactly the chunk's time:
what a sleep or the writing itself takes too long, the next sleep makes up for. Sleep and clock may be replaced, so
nothing in a test depends on real time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from offmoe.tiers.copier import CopyPart, Ticket, check_parts, count_bytes, move_bytes, split
from offmoe.tiers.work_queue import WorkQueue

CHUNK_BYTES = 2 << 20


class ThrottledCopier:
    """Carries `bytes_per_s`, and takes `latency_s` more at the beginning of each copy.

    `on_chunk(copy_idx, num_bytes)` is called on the link's thread when a chunk has arrived; copies count from 0.
    """

    def __init__(
        self, *, bytes_per_s: float, latency_s: float = 0.0, chunk_bytes: int = CHUNK_BYTES,
        sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.perf_counter,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        if bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s is {bytes_per_s}; a link needs a speed above 0")
        self._bytes_per_s, self._latency_s, self._chunk_bytes = bytes_per_s, latency_s, chunk_bytes
        self._sleep, self._clock, self._on_chunk = sleep, clock, on_chunk
        self._queue = WorkQueue(1, "offmoe-link")
        self._free_at = clock()  # touched by the link's thread only
        self._num_copies = 0
        self.carried_bytes = 0

    def __repr__(self) -> str:
        return f"<ThrottledCopier [{self._num_copies} copies, {self.carried_bytes} bytes carried | {self._queue!r}]>"

    def copy(self, parts: Sequence[CopyPart], *, urgent: bool = True, after: object | None = None) -> Ticket:
        """Queue the copy."""
        check_parts(parts)
        asked_at = self._clock()
        pieces = [
            partial(self._carry, self._num_copies, chunk, asked_at, 0.0 if idx else self._latency_s)
            for idx, chunk in enumerate(split(parts, self._chunk_bytes))
        ]
        self._num_copies += 1
        return self._queue.submit(pieces, urgent=urgent)

    def mark(self) -> None:
        """Work in host memory has ended when it returns."""

    def restart(self) -> None:
        """Take back what is queued and end what is under way."""
        self._queue.restart()

    def close(self) -> None:
        """Carry what is queued, then end the thread."""
        self._queue.close(finish=True)

    def _carry(self, copy_idx: int, chunk: Sequence[CopyPart], asked_at: float, latency_s: float) -> None:
        num_bytes = count_bytes(chunk)
        self._free_at = max(self._free_at, asked_at) + latency_s + num_bytes / self._bytes_per_s
        self._sleep(max(0.0, self._free_at - self._clock()))
        for src, dst in chunk:
            move_bytes(src, dst)
        self.carried_bytes += num_bytes
        if self._on_chunk is not None:
            self._on_chunk(copy_idx, num_bytes)
