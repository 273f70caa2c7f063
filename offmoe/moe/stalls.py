"""Stall of a device's stream by the layer whose copies caused it, learnt when the host next waits for the device.

The host does not wait for a copy to a CUDA device: it makes the stream wait and goes on. So its clock says nothing
about the stall. Instead two points are put on the stream, before and after it is made to wait for a copy, and the time
between them is read once both have passed. That is after the next wait of the host for the same stream, usually for
what the next layer's router chose; by then the layer's time is still booked on the layer whose copies caused it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from offmoe.tiers.device import Moment

T = TypeVar("T")


@dataclass(slots=True)
class LayerStall:
    """One layer call's waits: `stall_ns`, when it is measured, `disk_ns` of it the host's for the disk."""

    layer_idx: int
    disk_ns: int = 0
    stall_ns: int = 0
    _waits: list[tuple[Moment, Moment]] = field(default_factory=list)

    @property
    def link_ns(self) -> int:
        """The stall without the waits for the disk."""
        return max(0, self.stall_ns - self.disk_ns)

    def read(self) -> bool:
        """Read every wait that the stream has passed; True when none is left."""
        while self._waits:
            begin, end = self._waits[0]
            wait_ns = end.ns_since(begin)
            if wait_ns is None:
                return False
            self.stall_ns += wait_ns
            del self._waits[0]
        return True


class StreamStalls:
    """The stalls of layer calls that have not been measured yet, oldest first. `moment` puts a point on the stream."""

    def __init__(self, moment: Callable[[], Moment]) -> None:
        self._moment = moment
        self._now: LayerStall | None = None
        self._unread: deque[LayerStall] = deque()

    def wait(self, layer_idx: int, finish: Callable[[], T]) -> T:
        """`finish()`, which makes the stream wait for a copy."""
        begin = self._moment()
        finished = finish()
        if self._now is None:
            self._now = LayerStall(layer_idx)
        self._now._waits.append((begin, self._moment()))
        return finished

    def layer_waited(self, *, disk_ns: int) -> None:
        """The layer has made the stream wait for all its copies."""
        if self._now is not None:
            self._now.disk_ns = disk_ns
            self._unread.append(self._now)
            self._now = None

    def measured(self) -> Iterator[LayerStall]:
        """Stalls that can be read by now. Call it after the host has waited for the stream."""
        while self._unread and self._unread[0].read():
            yield self._unread.popleft()

    def forget(self) -> None:
        """A call was broken off."""
        self._now = None
        self._unread.clear()
