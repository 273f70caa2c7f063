"""The queue before the engine: one thread that runs requests one after another, fairly, and can be stopped anywhere.

Threads: the event loop submits and cancels jobs and takes their events; the engine's thread runs them and gives events.
A job's lists are guarded by its lock, the queue's by the queue's. Events of a job come in their order, and the last one
is None. Not promised: that a cancelled job's events stop at once; who cancels takes no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from offmoe.core.errors import OffmoeError
from offmoe.server.errors import ApiError

_log = logging.getLogger("offmoe.server")
_RETRY_AFTER_S = 5
_LEAST_S = 0.01


class ServerJob:
    """One request on its way through the engine. `run(job)` is called on the engine's thread."""

    def __init__(self, client: str, run: Callable[[ServerJob], None]) -> None:
        self.client, self._run = client, run
        self.created = time.monotonic()
        self.begun: float | None = None
        self.is_cancelled = False
        # The server ends: the reply so far is the reply.
        self.is_cut = False
        self._lock = threading.Lock()
        self._events: list[Any] = []
        self._close: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._is_told = False
        self._taken = 0.0

    def emit(self, event: Any) -> None:
        """Give an event to the client's side. Many between two looks of the loop wake it once."""
        with self._lock:
            self._events.append(event)
            if self._is_told:
                return
            self._is_told = True
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it all clients
            self._loop.call_soon_threadsafe(self._wake)

    async def take(self, timeout_s: float) -> list[Any]:
        """All events that there are; none where none comes in `timeout_s`.

        At most a hundred times a second: each look and what follows it takes the interpreter from the engine.
        """
        if (early := self._taken + _LEAST_S - self._loop.time()) > 0:
            await asyncio.sleep(early)
        if not self._events:
            self._waiter = self._loop.create_future()
            timer = self._loop.call_later(timeout_s, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        with self._lock:
            events, self._events = self._events, []
            self._is_told = False
        self._taken = self._loop.time()
        return events

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def ends_by(self, close: Callable[[], None]) -> None:
        """`close`, callable from any thread, ends what the job does now."""
        with self._lock:
            self._close = close
            stopped = self.is_cancelled or self.is_cut
        if stopped:
            close()

    def cancel(self) -> None:
        """Nobody wants the reply any more. In the queue it is skipped, in the engine it ends at the next step."""
        self._stop(cancelled=True)

    def cut(self) -> None:
        """End the reply here, for the client to keep."""
        self._stop(cancelled=False)

    def _stop(self, *, cancelled: bool) -> None:
        with self._lock:
            self.is_cancelled |= cancelled
            self.is_cut |= not cancelled
            close = self._close
        if close is not None:
            close()

    @property
    def is_stopped(self) -> bool:
        """Cancelled or cut."""
        return self.is_cancelled or self.is_cut

    def execute(self) -> None:
        """Run it, on the engine's thread. No error leaves it: each becomes an event."""
        self.begun = time.monotonic()
        try:
            if not self.is_cancelled:
                self._run(self)
        except OffmoeError as error:
            self.emit(error)
        except ApiError as error:
            self.emit(error)
        except Exception as error:  # noqa: BLE001 - a failed request never takes the server down
            _log.error("a request failed", exc_info=error)
            self.emit(error)
        finally:
            self._close = None
            self.emit(None)


class JobQueue:
    """Jobs of several clients, taken in turns: one of each client before the second of any."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, deque[ServerJob]] = OrderedDict()
        self._running: ServerJob | None = None
        self.is_closed = False
        self.num_refused = 0

    def submit(self, job: ServerJob) -> ServerJob:
        """Put `job` at its client's end. Raises ApiError 429 where the queue is full, 503 where it is closed."""
        with self._changed:
            if self.is_closed:
                raise ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down")
            if len(self) >= self._most:
                self.num_refused += 1
                raise ApiError(
                    429, f"{self._most} requests wait already; try again later", kind="rate_limit_error",
                    code="queue_full", headers={"Retry-After": str(_RETRY_AFTER_S)},
                )  # fmt: skip
            self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify_all()
        return job

    def __len__(self) -> int:
        """Jobs that wait and that somebody waits for."""
        return sum(not job.is_cancelled for jobs in self._waiting.values() for job in jobs)

    @property
    def num_running(self) -> int:
        """0 or 1."""
        return int(self._running is not None)

    def position(self, job: ServerJob) -> int:
        """Jobs that come before `job`, at least: those that run and those of its own client."""
        with self._changed:
            if self._running is job:
                return 0
            own = [other for other in self._waiting.get(job.client, ()) if not other.is_cancelled]
            before = own.index(job) if job in own else 0
            others = [len(jobs) for client, jobs in self._waiting.items() if client != job.client]
            return self.num_running + before + sum(min(num, before + 1) for num in others)

    def run(self, after: Callable[[], None] = lambda: None) -> None:
        """Run jobs until the queue is closed, on the calling thread; `after` each one."""
        while (job := self._next()) is not None:
            job.execute()
            with self._changed:
                self._running = None
                self._changed.notify_all()
            after()

    def close(self) -> None:
        """End the running job with what it has, refuse those that wait, and let `run` return."""
        with self._changed:
            self.is_closed = True
            waiting = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            running = self._running
            self._changed.notify_all()
        for job in waiting:
            job.emit(ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down"))
            job.emit(None)
        if running is not None:
            running.cut()

    def _next(self) -> ServerJob | None:
        with self._changed:
            while True:
                while self._waiting:
                    client, jobs = self._waiting.popitem(last=False)
                    job = jobs.popleft()
                    if jobs:
                        self._waiting[client] = jobs  # behind the others
                    if not job.is_cancelled:
                        self._running = job
                        return job
                if self.is_closed:
                    return None
                self._changed.wait()
