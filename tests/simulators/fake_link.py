"""A link without a device: what is queued arrives only when somebody waits for it, and is read only then."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import torch

from offmoe.tiers.copier import CopyPart
from offmoe.tiers.ring import CHUNK_BYTES, RING_CHUNKS, RingCopier


class LazyArrival:
    """The end of a chunk."""

    def __init__(self, link: LazyLink, parts: Sequence[CopyPart], *, urgent: bool) -> None:
        self._link, self.parts, self.urgent = link, parts, urgent
        self.arrived = False

    def done(self) -> bool:
        return self.arrived

    def wait(self) -> None:
        self._link.carry_until(self)

    def order(self) -> None:
        self._link.num_orders += 1
        self._link.carry_until(self)


class LazyLink:
    """Carries as late as it can, each lane in order; so a source that is reused too early is seen in the bytes.

    `begun`: (urgent, bytes, after) of each chunk. `on_begin` is called by the thread that queues, before it does.
    """

    def __init__(self, *pinned: torch.Tensor) -> None:
        self.pinned = pinned
        self.begun: list[tuple[bool, int, object | None]] = []
        self.threads: list[str] = []
        self.staged: list[bool] = []
        self.num_orders = self.num_marks = self.most_in_flight = 0
        self.fails_at = -1
        self._lanes: dict[bool, deque[LazyArrival]] = {False: deque(), True: deque()}
        self._lock = threading.RLock()

    def on_begin(self) -> None:
        """Replaced by tests."""

    def reads(self, parts: Sequence[CopyPart]) -> bool:
        return all(
            any(memory.data_ptr() <= src.data_ptr() < memory.data_ptr() + memory.nbytes for memory in self.pinned)
            for src, _ in parts
        )

    def begin(self, parts: Sequence[CopyPart], *, urgent: bool, after: object | None) -> LazyArrival:
        self.on_begin()
        with self._lock:
            if len(self.begun) == self.fails_at:
                raise OSError("the link broke")
            self.begun.append((urgent, sum(src.nbytes for src, _ in parts), after))
            self.threads.append(threading.current_thread().name)
            arrival = LazyArrival(self, list(parts), urgent=urgent)
            self._lanes[urgent].append(arrival)
            self.most_in_flight = max(self.most_in_flight, len(self._lanes[False]))
        return arrival

    def mark(self) -> int:
        self.num_marks += 1
        return self.num_marks

    def synchronize(self) -> None:
        with self._lock:
            for lane in self._lanes.values():
                if lane:
                    self.carry_until(lane[-1])

    def carry_until(self, arrival: LazyArrival) -> None:
        with self._lock:
            while not arrival.arrived:
                first = self._lanes[arrival.urgent].popleft()
                for src, dst in first.parts:
                    dst.copy_(src)
                first.arrived = True


def make_ring_copier(link: LazyLink, *, chunk_bytes: int = CHUNK_BYTES, ring_chunks: int = RING_CHUNKS) -> RingCopier:
    """With a ring, unless it has no chunks."""
    ring = torch.zeros(ring_chunks * chunk_bytes, dtype=torch.uint8) if ring_chunks else None
    return RingCopier(link, ring, chunk_bytes=chunk_bytes, pinned_chunk_bytes=chunk_bytes)
