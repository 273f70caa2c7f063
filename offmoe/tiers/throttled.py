"""A link of a set speed, played by a thread: overlap, late arrivals and cancellation can be tested without a device.

Concurrency. One worker thread carries copies in the order of `copy()` calls, as one side stream would. The bytes are
written at the *end* of the simulated transfer, so a reader that did not wait sees old bytes, as on real hardware.
A cancelled copy that has not begun never writes; one that has begun runs to its end. The clock may be replaced by the
test, so nothing here depends on real time.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import torch

from offmoe.tiers.copier import flatten


class CancelledCopyError(RuntimeError):
    """Waited for a copy that was cancelled before it began."""


class ThrottledTicket:
    """States: queued -> running -> done, or queued -> cancelled."""

    def __init__(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        self.src, self.dst = src, dst
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._begun = False
        self.cancelled = False

    def done(self) -> bool:
        """True when copied or cancelled."""
        return self._ended.is_set()

    def wait(self) -> None:
        """Block until the end. Raises CancelledCopyError."""
        self._ended.wait()
        if self.cancelled:
            raise CancelledCopyError("the copy was cancelled before it began")

    def cancel(self) -> bool:
        """Take a queued copy back; False when it has begun already."""
        with self._lock:
            if self._begun:
                return False
            self.cancelled = True
        self._ended.set()
        return True

    def begin(self) -> bool:
        """Called by the worker: claim the copy, unless it was cancelled."""
        with self._lock:
            self._begun = not self.cancelled
        return self._begun

    def end(self) -> None:
        """Called by the worker: write the bytes and tell the waiters."""
        self.dst.copy_(self.src)
        self._ended.set()


class ThrottledCopier:
    """Carries `bytes_per_s` with `latency_s` a copy, one copy at a time."""

    def __init__(
        self, *, bytes_per_s: float, latency_s: float = 0.0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        if bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s is {bytes_per_s}; a link needs a speed above 0")
        self._bytes_per_s, self._latency_s, self._sleep = bytes_per_s, latency_s, sleep
        self._queue: queue.SimpleQueue[ThrottledTicket | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._carry, name="offmoe-link", daemon=True)
        self._closed = False
        self._thread.start()

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> ThrottledTicket:
        """Queue the copy. Raises ValueError when it cannot be done, and after close()."""
        if self._closed:
            raise ValueError("the copier is closed")
        ticket = ThrottledTicket(*flatten(src, dst))
        self._queue.put(ticket)
        return ticket

    def close(self) -> None:
        """Carry what is queued, then end the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()

    def _carry(self) -> None:
        while (ticket := self._queue.get()) is not None:
            if ticket.begin():
                self._sleep(self._latency_s + ticket.src.nbytes / self._bytes_per_s)
                ticket.end()
