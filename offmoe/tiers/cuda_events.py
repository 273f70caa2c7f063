"""CUDA events, recorded again and again instead of made and destroyed for each copy.

Reuse. An event goes back to its device's free list when nothing refers to the object that holds it any more. It may
then be recorded again at once, passed or not: a stream that was made to wait for it waits for the record of that time
(CUDA Runtime API, cudaStreamWaitEvent), and a host that waits for it holds the object meanwhile. Any thread may take
an event or drop one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from offmoe.core.errors import DeviceError


class EventPool:
    """Free lists of one device, by kind: blocking ones for hosts that sleep, timed ones, and plain marks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: dict[str, deque[Any]] = {"": deque(), "blocking": deque(), "enable_timing": deque()}

    def take(self, kind: str) -> Any:
        """An event for `give_back`; made where none is free."""
        try:
            return self._free[kind].pop()
        except IndexError:
            return torch.cuda.Event(**({kind: True} if kind else {}))

    def give_back(self, kind: str, event: Any) -> None:
        """Let `event` be recorded again."""
        self._free[kind].append(event)


class CudaMark:
    """An event recorded on `stream`, by default the calling thread's current one. Raises DeviceError."""

    _KIND, _DOING = "", "computing"

    def __init__(self, pool: EventPool, stream: torch.cuda.Stream | None = None) -> None:
        self._pool = pool
        self.event: Any = None
        try:
            self.event = pool.take(self._KIND)
            self.event.record(torch.cuda.current_stream(pool.device) if stream is None else stream)
        except RuntimeError as error:
            raise as_device_error(error, pool.device, self._DOING) from error

    def __del__(self) -> None:
        if self.event is not None:
            self._pool.give_back(self._KIND, self.event)

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except RuntimeError as error:
            raise as_device_error(error, self._pool.device, self._DOING) from error


class CudaArrival(CudaMark):
    """An event behind what was queued. A blocking one: who waits for it sleeps, and leaves its core to those who
    compute.
    """

    _KIND, _DOING = "blocking", "copying"

    def done(self) -> bool:
        """True also on a lost device, where nothing will arrive; wait() and order() raise then."""
        try:
            return bool(self.event.query())
        except RuntimeError:
            return True

    def wait(self) -> None:
        """Sleep until it has happened. Raises DeviceError."""
        self._ask(self.event.synchronize)

    def order(self) -> None:
        """Make the calling thread's current stream wait. Raises DeviceError."""
        self._ask(lambda: torch.cuda.current_stream(self._pool.device).wait_event(self.event))


class CudaMoment(CudaMark):
    """An event with its time."""

    _KIND = "enable_timing"

    def ns_since(self, earlier: CudaMoment) -> int | None:
        """Nanoseconds to half a microsecond, the resolution of events; see `Moment`. Raises DeviceError."""
        elapsed = self._ask(lambda: earlier.event.elapsed_time(self.event) if self.event.query() else None)
        return None if elapsed is None else int(elapsed * 1e6)


def as_device_error(error: RuntimeError, device: torch.device, doing: str) -> DeviceError:
    """Message for the user of a CUDA call that failed while `doing` something."""
    return DeviceError(
        f"{device} failed while {doing} ({one_sentence(error)}); start again, and look at nvidia-smi and the system "
        "log if it comes back"
    )


def one_sentence(error: BaseException) -> str:
    """Return the first sentence of what `error` says, in printable letters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(letter for letter in lines[0].split(". ")[0].rstrip(".") if letter.isprintable())[:200]
