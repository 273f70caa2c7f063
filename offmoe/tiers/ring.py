"""The copier of a device: chunks, staging and priority. What touches the device is behind `Link` (tiers/cuda.py).

Three ways for the bytes, best first:
- urgent, from memory that the device can read itself (pinned): queued at once, by the calling thread;
- not urgent, from such memory: the worker queues it whole, or in large chunks;
- from other memory: the worker moves each chunk into a ring of pinned chunks and queues it from there. Without such a
  ring it queues the chunk from where it lies, and the driver stages it while the worker waits.

Concurrency. One worker thread (a `WorkQueue`) and the calling thread. The link has two lanes, urgent and not; copies of
one lane arrive in the order in which they were queued, and nothing is promised between lanes. An urgent copy overtakes
because few chunks that are not urgent are on the device's queue (MAX_IN_FLIGHT). Where chunks are
staged the worker waits for room as a piece of its own, and chooses what to do next only afterwards; urgent copies from
pinned memory do not need the worker.

Reuse. A chunk of the ring is written again only when its arrival is done. A destination may be given to another copy,
and a source be written to, when the ticket is done, or its wait() has raised: by then no chunk of it is queued or on
its way. Between a ticket's wait() and its done(), a copy to the same destination must be given a mark that was made
after that wait().
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from offmoe.tiers.copier import CopyPart, Ticket, check_parts, count_bytes, move_bytes, split
from offmoe.tiers.work_queue import Job, WorkQueue

CHUNK_BYTES = 2 << 20
RING_CHUNKS = 4
# From pinned memory: an expert is one piece of work for Python. 16 MiB are 0.3 ms of a fast link, 1.3 ms of a slow one.
PINNED_CHUNK_BYTES = 16 << 20
# So many chunks may be queued whatever their size: the link is to find the next one when one ends.
MAX_IN_FLIGHT = 2


class Arrival(Protocol):
    """Bytes that were queued on the link."""

    def done(self) -> bool:
        """True when they are there, or will never be. Never blocks, never raises."""

    def wait(self) -> None:
        """Block until they are there."""

    def order(self) -> None:
        """Make what the calling thread submits to the device from now on come after them."""


class Link(Protocol):
    """Two lanes to a device. `begin` is called by the worker and by the thread that owns the copier."""

    def reads(self, parts: Sequence[CopyPart]) -> bool:
        """True when the device can read all sources itself, while the caller goes on."""

    def begin(self, parts: Sequence[CopyPart], *, urgent: bool, after: object | None) -> Arrival:
        """Queue on a lane, behind the point `after`. On failure nothing is left queued."""

    def mark(self) -> object | None:
        """The point that the calling thread's submitted work has reached."""

    def synchronize(self) -> None:
        """Block until nothing is queued on either lane."""


class RingTicket:
    """A copy in chunks. `urgent`, `after` and `arrivals` are for the copier: the last arrival of each lane used."""

    def __init__(self, *, urgent: bool, after: object | None) -> None:
        self.urgent, self.after = urgent, after
        self.arrivals: dict[bool, Arrival] = {}
        self.job: Job | None = None
        self.error: Exception | None = None

    def done(self) -> bool:
        """See Ticket."""
        return (self.job is None or self.job.done()) and all(arrival.done() for arrival in self.arrivals.values())

    def wait(self) -> None:
        """See Ticket: blocks until all chunks are queued, then orders the caller's work behind them."""
        try:
            if self.job is not None:
                self.job.wait()
            elif self.error is not None:
                raise self.error
        except Exception:
            for arrival in self.arrivals.values():
                with contextlib.suppress(Exception):  # what went wrong first is raised
                    arrival.wait()
            raise
        for arrival in self.arrivals.values():
            arrival.order()

    def cancel(self) -> bool:
        """See Ticket."""
        return self.job is not None and self.job.cancel()

    def promote(self) -> None:
        """See Ticket. Chunks on the device's queue stay where they are."""
        self.urgent = True
        if self.job is not None:
            self.job.promote()


class RingCopier:
    """Copies over `link`, by way of `ring` (pinned host memory, a multiple of `chunk_bytes`) where it must."""

    def __init__(
        self, link: Link, ring: torch.Tensor | None, *, chunk_bytes: int = CHUNK_BYTES,
        pinned_chunk_bytes: int = PINNED_CHUNK_BYTES,
    ) -> None:  # fmt: skip
        """`pinned_chunk_bytes`: of what the device reads itself, and as many may be on its queue."""
        self._link, self._chunk_bytes, self._pinned_chunk_bytes = link, chunk_bytes, pinned_chunk_bytes
        self._queue = WorkQueue(1, "offmoe-link")
        # Touched by the worker only.
        self._free: list[torch.Tensor] = [] if ring is None else list(torch.split(ring, chunk_bytes))
        self._staged: deque[tuple[torch.Tensor, Arrival]] = deque()
        self._in_flight: deque[tuple[int, Arrival]] = deque()
        self._in_flight_bytes = 0
        self._has_ring = ring is not None
        self._is_open = True

    def __repr__(self) -> str:
        return f"<RingCopier [{'staged' if self._has_ring else 'no staging'} | {self._queue!r}]>"

    def copy(self, parts: Sequence[CopyPart], *, urgent: bool = True, after: object | None = None) -> Ticket:
        """See Copier."""
        check_parts(parts)
        if not self._is_open:
            raise ValueError("the copier is closed")
        ticket = RingTicket(urgent=urgent, after=after)
        is_pinned = self._link.reads(parts)
        if urgent and is_pinned:
            try:
                self._begin(ticket, [part for part in parts if part[0].nbytes], urgent=True)
            except Exception as error:  # noqa: BLE001 - raised by wait()
                ticket.error = error
            return ticket
        pieces: list[Callable[[], None]] = []
        for chunk in split(parts, self._pinned_chunk_bytes if is_pinned else self._chunk_bytes):
            if is_pinned:
                pieces.append(partial(self._carry_pinned, ticket, chunk))
                continue
            if not urgent:
                pieces.append(partial(self._wait_for_room, ticket, 0))
            pieces.append(partial(self._carry, ticket, chunk))
        ticket.job = self._queue.submit(pieces, urgent=urgent)
        return ticket

    def mark(self) -> object | None:
        """See Copier."""
        return self._link.mark()

    def restart(self) -> None:
        """See Copier."""
        self._queue.restart()
        self._link.synchronize()

    def close(self) -> None:
        """See Copier."""
        self._is_open = False
        self._queue.close(finish=True)
        self._link.synchronize()

    def _begin(self, ticket: RingTicket, parts: Sequence[CopyPart], *, urgent: bool) -> Arrival:
        arrival = self._link.begin(parts, urgent=urgent, after=ticket.after)
        ticket.arrivals[urgent] = arrival
        return arrival

    def _wait_for_room(self, ticket: RingTicket, num_bytes: int) -> None:
        """Until few chunks are on the queue; or few bytes, with `num_bytes` more, which is 0 for what is staged."""
        while not ticket.urgent and len(self._in_flight) >= MAX_IN_FLIGHT:
            if 0 < num_bytes <= self._pinned_chunk_bytes - self._in_flight_bytes:
                break
            oldest_bytes, oldest = self._in_flight.popleft()
            self._in_flight_bytes -= oldest_bytes
            oldest.wait()

    def _carry_pinned(self, ticket: RingTicket, chunk: Sequence[CopyPart]) -> None:
        num_bytes = count_bytes(chunk)
        self._wait_for_room(ticket, num_bytes)
        urgent = ticket.urgent
        arrival = self._begin(ticket, chunk, urgent=urgent)
        if not urgent:
            self._in_flight.append((num_bytes, arrival))
            self._in_flight_bytes += num_bytes

    def _carry(self, ticket: RingTicket, chunk: Sequence[CopyPart]) -> None:
        urgent = ticket.urgent
        if self._has_ring and not self._link.reads(chunk):
            staging = self._take_staging()
            try:
                arrival = self._begin(ticket, _stage(chunk, staging), urgent=urgent)
            except BaseException:
                self._free.append(staging)
                raise
            self._staged.append((staging, arrival))
        else:
            arrival = self._begin(ticket, chunk, urgent=urgent)
        if not urgent:
            self._in_flight.append((0, arrival))

    def _take_staging(self) -> torch.Tensor:
        """A chunk of the ring from which nothing is being read."""
        while not self._free:
            if not any(arrival.done() for _, arrival in self._staged):
                self._staged[0][1].wait()
            staged, self._staged = self._staged, deque()
            for staging, arrival in staged:
                if arrival.done():
                    self._free.append(staging)
                else:
                    self._staged.append((staging, arrival))
        return self._free.pop()


def _stage(chunk: Sequence[CopyPart], staging: torch.Tensor) -> list[CopyPart]:
    """Move the sources into `staging`; the parts with their sources there."""
    begin, parts = 0, []
    for src, dst in chunk:
        staged = staging.narrow(0, begin, src.nbytes)
        move_bytes(src, staged)
        parts.append((staged, dst))
        begin += src.nbytes
    return parts
