"""Threads that carry out the pieces of jobs, urgent jobs first. Disk reads and copies over a link both run on it.

Concurrency. Jobs are submitted, cancelled, promoted and waited for by the one thread that runs the model; pieces run
on the queue's own threads. A thread chooses its next piece only when the one before has ended, so an urgent job
overtakes between the pieces of another. Pieces of one job begin in order, and with several threads overlap.

Ctrl-C may break off any call here between two lines. Every change is therefore one store, or is harmless when what
should follow it does not; a plain lock guards it (`threading.Condition` and `Event` take theirs in Python code, where
an interrupt leaves it locked).
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from offmoe.core.errors import ResourceError
from offmoe.core.forks import OneProcess
from offmoe.tiers.copier import CancelledMoveError

JobPiece = Callable[[], None]


class Job:
    """Pieces of work that end together; a `Ticket`. Made by `WorkQueue.submit`."""

    def __init__(self, queue: WorkQueue, crew: _Crew, pieces: Sequence[JobPiece], *, urgent: bool) -> None:
        self._queue = queue  # keeps its threads while the job lives
        self._crew = crew
        self._pieces = pieces
        self._num_pieces = self._end = len(pieces)  # pieces from `_end` on were taken back
        self._begun = self._running = 0
        self._urgent = urgent
        self._error: tuple[int, BaseException] | None = None
        self._gate = threading.Lock()  # locked until the job has ended
        self._gate.acquire()

    def __repr__(self) -> str:
        state = "ended" if self.done() else "cancelled" if self._is_cancelled() else "under way"
        return f"<Job [{self._begun} of {self._num_pieces} pieces begun, {state}{', urgent' if self._urgent else ''}]>"

    def done(self) -> bool:
        """True when every piece has ended, failed, or was taken back before it began."""
        with self._crew.lock:
            return self._has_ended()

    def wait(self) -> None:
        """Block until no piece is under way or to come, also when one has failed.

        Raises what the first of the pieces that failed raised; CancelledMoveError when pieces were taken back.
        """
        if not self.done():
            with self._gate:
                pass
        if self._is_cancelled():
            raise CancelledMoveError("the move was taken back before it was complete")
        if self._error is not None:
            raise self._error[1]

    def cancel(self) -> bool:
        """Take back the pieces that have not begun. False when there are none, and none were taken back before."""
        with self._crew.lock:
            self._end = self._begun
            self._open_gate()
            return self._is_cancelled()

    def promote(self) -> None:
        """Go before every job that is not urgent, after those that are."""
        with self._crew.lock:
            if not self._urgent and self._begun < self._end:
                self._crew.lanes[0].append(self)  # it stays in the other lane too, and is exhausted when met there
                self._urgent = True
                self._crew.call(self._end - self._begun)

    def _is_cancelled(self) -> bool:
        return self._end < self._num_pieces

    def _has_ended(self) -> bool:
        return self._begun == self._end and not self._running

    def _open_gate(self) -> None:
        if self._has_ended():
            self._pieces = ()  # a ticket that is kept does not keep the memory it wrote to
            if self._gate.locked():
                self._gate.release()

    def begin_piece(self) -> int | None:
        """For a thread of the crew, under the lock: the index of the next piece, None when there is none."""
        if self._begun == self._end:
            return None
        self._running += 1
        self._begun += 1
        return self._begun - 1

    def run_piece(self, idx: int) -> None:
        """For a thread of the crew, without the lock."""
        error: BaseException | None = None
        try:
            self._pieces[idx]()
        except BaseException as caught:  # noqa: BLE001 - raised by wait()
            error = caught
        with self._crew.lock:
            if error is not None and (self._error is None or idx < self._error[0]):
                self._error = (idx, error)
            self._running -= 1
            self._open_gate()


class _Crew:
    """The threads of a queue and what they share. It does not know the queue, so that a forgotten queue can end."""

    def __init__(self, num_threads: int, name: str, max_others: int) -> None:
        self.lock = threading.Lock()
        self.lanes: tuple[deque[Job], deque[Job]] = (deque(), deque())  # urgent, not urgent
        self._max_others, self._num_others = max_others, 0  # pieces of jobs that are not urgent, at once and now
        self._calls: SimpleQueue[bool] = SimpleQueue()  # True: there may be work; False: end
        self.is_open = True
        self._process = OneProcess()
        self._threads: list[threading.Thread] = []
        for idx in range(num_threads):
            thread = threading.Thread(target=self._work, name=f"{name}-{idx}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads: those there are do the work
                if not self._threads:
                    raise ResourceError(
                        f"the system refuses a thread ({error}), and {name} needs 1 of {num_threads}; end other "
                        "programs, or raise the limit (ulimit -u, or pids.max of a container)"
                    ) from None
                break
            self._threads.append(thread)
        atexit.register(self.end)  # a daemon thread that dies within a library call may abort the process

    def add(self, job: Job, num_pieces: int, *, urgent: bool) -> None:
        self._process.check()
        with self.lock:
            if not self.is_open:
                raise ValueError("the queue is closed")
            self.lanes[0 if urgent else 1].append(job)
        self.call(num_pieces)

    def call(self, num_pieces: int) -> None:
        """There is work for as many threads; those that are busy look for more by themselves."""
        for _ in range(min(num_pieces, len(self._threads))):
            self._calls.put(True)

    def end(self, *, finish: bool = False) -> None:
        """End the threads; queued pieces are carried out first or taken back. May be repeated after an interrupt.

        A forked child has no threads to end, and a thread of its parent may have held the lock.
        """
        if not self._process.is_here:
            return
        with self.lock:
            self.is_open = False
        if not finish:
            for job in [job for lane in self.lanes for job in tuple(lane)]:
                job.cancel()
        self.let_go()
        for thread in self._threads:
            thread.join()
        atexit.unregister(self.end)

    def let_go(self) -> None:
        """Let the threads end when they have nothing to do. Takes no lock: the garbage collector may call it."""
        for _ in self._threads:
            self._calls.put(False)

    def _work(self) -> None:
        go_on = True
        while go_on:
            go_on = self._calls.get()
            while (chosen := self._choose()) is not None:
                job, idx, is_other = chosen
                job.run_piece(idx)
                del chosen, job
                if is_other:
                    with self.lock:
                        self._num_others -= 1

    def _choose(self) -> tuple[Job, int, bool] | None:
        """The next piece, and whether it was taken from the lane of jobs that are not urgent."""
        with self.lock:
            for is_other, lane in enumerate(self.lanes):
                if is_other and self._num_others >= self._max_others:
                    return None
                while lane:
                    idx = lane[0].begin_piece()
                    if idx is not None:
                        self._num_others += is_other
                        return lane[0], idx, bool(is_other)
                    lane.popleft()
        return None


class WorkQueue:
    """`num_threads` threads that carry out jobs, urgent ones first, otherwise in the order of `submit`.

    At most `max_others` pieces of jobs that are not urgent run at once, so that an urgent one finds threads. Where the
    system refuses some of the threads, fewer do the work; ResourceError where it refuses all.
    """

    def __init__(self, num_threads: int, name: str, *, max_others: int | None = None) -> None:
        self._num_threads, self._name = num_threads, name
        self._max_others = num_threads if max_others is None else max_others
        self._lacks_threads = False
        self._crew = self._start()

    def __repr__(self) -> str:
        urgent, others = (len(lane) for lane in self._crew.lanes)
        return f"<WorkQueue {self._name} [{self._num_threads} threads | queued: {urgent} urgent, {others} others]>"

    def submit(self, pieces: Sequence[JobPiece], *, urgent: bool) -> Job:
        """Queue a job. A piece that raises does not stop the others. Raises ValueError after close(), ResourceError
        where a restart got no thread and there is none yet.
        """
        if self._lacks_threads:
            self._crew, self._lacks_threads = self._start(), False
        job = Job(self, self._crew, pieces, urgent=urgent)
        self._crew.add(job, len(pieces), urgent=urgent)
        return job

    def restart(self) -> None:
        """End every job, also those whose ticket was lost: what has not begun is taken back, what has begun ends.

        Afterwards no piece runs, and jobs may be submitted.
        """
        self.close()
        self._lacks_threads = True
        with contextlib.suppress(ResourceError):  # `submit` tries again: a restart is part of clearing up, and succeeds
            self._crew, self._lacks_threads = self._start(), False

    def close(self, *, finish: bool = False) -> None:
        """End the threads after the pieces under way; `finish`: after all that is queued, else it is taken back."""
        self._lacks_threads = False
        self._crew.end(finish=finish)

    def _start(self) -> _Crew:
        crew = _Crew(self._num_threads, self._name, self._max_others)
        weakref.finalize(self, crew.let_go).atexit = False
        return crew
