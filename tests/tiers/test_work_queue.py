"""The work queue: order, cancellation, failure, restart; and its tickets as a state machine against a plain model."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE_S

from offmoe.tiers.copier import CancelledMoveError
from offmoe.tiers.work_queue import Job, WorkQueue


class Pieces:
    """Pieces that begin, and end when the test says so."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self._begun, self._may_end = threading.Semaphore(0), threading.Semaphore(0)

    def make(self, *names: str, fail: str = "") -> list[Callable[[], None]]:
        return [lambda name=name: self._run(name, fail=name in fail) for name in names]  # type: ignore[misc]

    def _run(self, name: str, *, fail: bool) -> None:
        self.began.append(name)
        self._begun.release()
        assert self._may_end.acquire(timeout=PATIENCE_S)
        if fail:
            raise OSError(name)

    def wait_for_begin(self) -> None:
        assert self._begun.acquire(timeout=PATIENCE_S)

    def let_end(self, pieces: int = 1) -> None:
        self._may_end.release(pieces)


@pytest.fixture
def pieces() -> Pieces:
    return Pieces()


@pytest.fixture
def queue(pieces: Pieces) -> Iterator[WorkQueue]:
    made = WorkQueue(1, "test")
    yield made
    pieces.let_end(1000)
    made.close()


def finish(pieces: Pieces, *jobs: Job) -> None:
    pieces.let_end(1000)
    for job in jobs:
        job.wait()


def test_urgent_jobs_go_first_also_between_the_pieces_of_another(queue: WorkQueue, pieces: Pieces) -> None:
    slow = queue.submit(pieces.make("a", "b", "c"), urgent=False)
    later = queue.submit(pieces.make("d"), urgent=False)
    pieces.wait_for_begin()
    urgent = [queue.submit(pieces.make("x", "y"), urgent=True), queue.submit(pieces.make("z"), urgent=True)]
    assert repr(queue) == "<WorkQueue test [1 threads | queued: 2 urgent, 2 others]>"
    assert repr(slow) == "<Job [1 of 3 pieces begun, under way]>"
    finish(pieces, slow, later, *urgent)
    assert pieces.began == list("axyzbcd")
    assert repr(urgent[0]) == "<Job [2 of 2 pieces begun, ended, urgent]>"


def test_a_promoted_job_goes_behind_those_that_are_urgent_already(queue: WorkQueue, pieces: Pieces) -> None:
    first = queue.submit(pieces.make("a"), urgent=False)
    pieces.wait_for_begin()
    slow = [queue.submit(pieces.make(*names), urgent=False) for names in ("bc", "de")]
    urgent = queue.submit(pieces.make("x"), urgent=True)
    for _ in range(2):
        slow[1].promote()
    finish(pieces, first, *slow, urgent)
    assert pieces.began == list("axdebc")
    slow[1].promote()
    finish(pieces, queue.submit(pieces.make("f"), urgent=False))
    assert pieces.began == list("axdebcf")


def test_a_job_promoted_half_way(queue: WorkQueue, pieces: Pieces) -> None:
    jobs = [queue.submit(pieces.make(*names), urgent=False) for names in ("abc", "d")]
    jobs.append(queue.submit(pieces.make("e"), urgent=False))
    pieces.wait_for_begin()
    jobs[0].promote()
    jobs[2].promote()
    finish(pieces, *jobs)
    assert pieces.began == list("abced")


def test_pieces_of_one_job_overlap_on_several_threads(pieces: Pieces) -> None:
    queue = WorkQueue(3, "test")
    job = queue.submit(pieces.make(*"abcd"), urgent=True)
    for _ in range(3):
        pieces.wait_for_begin()
    assert sorted(pieces.began) == list("abc")
    finish(pieces, job)
    queue.close()


def test_cancelling_takes_back_what_has_not_begun(queue: WorkQueue, pieces: Pieces) -> None:
    job = queue.submit(pieces.make("a", "b", "c"), urgent=True)
    waiting = queue.submit(pieces.make("d"), urgent=True)
    pieces.wait_for_begin()
    assert waiting.cancel() and waiting.done()
    assert job.cancel() and not job.done()
    assert repr(job) == "<Job [1 of 3 pieces begun, cancelled, urgent]>"
    pieces.let_end()
    for cancelled in (job, waiting):
        with pytest.raises(CancelledMoveError):
            cancelled.wait()
        assert cancelled.done() and cancelled.cancel()
    finish(pieces, queue.submit(pieces.make("e"), urgent=False))
    assert pieces.began == ["a", "e"]


def test_the_last_piece_cannot_be_cancelled(queue: WorkQueue, pieces: Pieces) -> None:
    job = queue.submit(pieces.make("a"), urgent=True)
    pieces.wait_for_begin()
    assert not job.cancel()
    finish(pieces, job)
    assert not job.cancel()


def test_a_failure_does_not_stop_the_other_pieces(queue: WorkQueue, pieces: Pieces) -> None:
    job = queue.submit(pieces.make(*"abcd", fail="bc"), urgent=True)
    pieces.let_end(4)
    for _ in range(2):
        with pytest.raises(OSError, match="b"):
            job.wait()
    assert pieces.began == list("abcd") and job.done() and not job.cancel()


def test_the_failure_of_the_first_piece_is_told_whichever_failed_first(pieces: Pieces) -> None:
    queue, may_fail = WorkQueue(2, "test"), threading.Event()

    def slow() -> None:
        assert may_fail.wait(PATIENCE_S)
        raise OSError("first piece")

    def fast() -> None:
        raise OSError("second piece")

    job = queue.submit([slow, fast, may_fail.set], urgent=True)
    with pytest.raises(OSError, match="first piece"):
        job.wait()
    queue.close()


def test_a_job_without_pieces_has_ended(queue: WorkQueue) -> None:
    job = queue.submit([], urgent=False)
    assert job.done() and not job.cancel()
    job.wait()


def test_close_takes_back_or_finishes(pieces: Pieces) -> None:
    for does_finish in (False, True):
        queue = WorkQueue(1, "test")
        jobs = [queue.submit(pieces.make("a", "b"), urgent=False) for _ in range(2)]
        pieces.wait_for_begin()
        closing = threading.Thread(target=queue.close, kwargs={"finish": does_finish})
        closing.start()
        if not does_finish:
            with pytest.raises(CancelledMoveError):
                jobs[1].wait()
        pieces.let_end(4)
        closing.join(PATIENCE_S)
        assert not closing.is_alive() and all(job.done() for job in jobs)
        queue.close()
        with pytest.raises(ValueError, match="the queue is closed"):
            queue.submit(pieces.make("c"), urgent=True)
    assert pieces.began == list("a" + "abab")


def test_a_restart_ends_the_jobs_whose_tickets_were_lost(pieces: Pieces) -> None:
    queue = WorkQueue(2, "test")
    for name in "abcdef":
        queue.submit(pieces.make(name), urgent=name in "be")
    for _ in range(2):
        pieces.wait_for_begin()
    pieces.let_end(2)
    queue.restart()
    began = list(pieces.began)
    finish(pieces, queue.submit(pieces.make("g"), urgent=False))
    queue.close()
    assert pieces.began == [*began, "g"] and len(began) == 2


def test_a_ticket_does_not_keep_what_its_pieces_held(queue: WorkQueue) -> None:
    slot = bytearray(8)
    view = memoryview(slot)

    def write(view: memoryview = view) -> None:
        view[0] = 1

    job = queue.submit([write], urgent=True)
    job.wait()
    del view, write
    gc.collect()
    slot.extend(b"x")  # BufferError while a view of it lives
    assert job.done() and slot[0] == 1


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_forgotten_queue_ends_its_threads() -> None:
    queue = WorkQueue(2, "forgotten")
    job = queue.submit([lambda: None], urgent=True)
    job.wait()
    del queue
    assert any(thread.name.startswith("forgotten") for thread in threading.enumerate())
    del job
    gc.collect()
    wait_until(lambda: not any(thread.name.startswith("forgotten") for thread in threading.enumerate()))


def test_a_program_that_forgets_to_close_ends_after_the_piece_under_way() -> None:
    program = (
        "import threading\n"
        "from offmoe.tiers.work_queue import WorkQueue\n"
        "queue, begun = WorkQueue(1, 'test'), threading.Event()\n"
        "def first(): begun.set(); threading.main_thread().join(); print('ended')\n"
        "queue.submit([first, lambda: print('began')], urgent=False)\n"
        "begun.wait()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert (ended.stdout, ended.stderr) == ("ended\n", "")


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=6),
    steps=st.lists(st.tuples(st.sampled_from(["end", "cancel", "promote"]), st.integers(0, 5)), max_size=20),
)
def test_one_thread_does_what_a_plain_model_does(jobs: list[tuple[int, bool]], steps: list[tuple[str, int]]) -> None:
    """The thread is held at each piece, so its choices depend on the calls alone."""
    pieces, queue = Pieces(), WorkQueue(1, "test")
    blocker = queue.submit(pieces.make("blocker"), urgent=True)
    pieces.wait_for_begin()
    tickets = [
        queue.submit(pieces.make(*(f"{idx}.{piece}" for piece in range(size))), urgent=urgent)
        for idx, (size, urgent) in enumerate(jobs)
    ]
    left = {idx: [f"{idx}.{piece}" for piece in range(size)] for idx, (size, _) in enumerate(jobs)}
    urgent = [idx for idx, (_, is_urgent) in enumerate(jobs) if is_urgent]
    others = [idx for idx, (_, is_urgent) in enumerate(jobs) if not is_urgent]
    began, cancelled = ["blocker"], set()
    for step, idx in steps:
        if step == "end":
            chosen = next((job for job in [*urgent, *others] if left[job]), None)
            if chosen is None:
                continue
            began.append(left[chosen].pop(0))
            pieces.let_end()
            pieces.wait_for_begin()
        elif idx < len(jobs) and step == "cancel":
            if left[idx]:
                cancelled.add(idx)
                left[idx] = []
            assert tickets[idx].cancel() == (idx in cancelled)
        elif idx < len(jobs) and step == "promote":
            tickets[idx].promote()
            if idx in others and left[idx]:
                others.remove(idx)
                urgent.append(idx)
        assert pieces.began == began
    began += [name for job in [*urgent, *others] for name in left[job]]
    pieces.let_end(1000)
    blocker.wait()
    for idx, ticket in enumerate(tickets):
        if idx in cancelled:
            with pytest.raises(CancelledMoveError):
                ticket.wait()
        else:
            ticket.wait()
    queue.close()
    assert pieces.began == began


def test_pieces_that_are_not_urgent_leave_threads_for_those_that_are() -> None:
    """Four threads, two for what is not urgent: an urgent piece finds one at once, and a promoted job gets them all."""
    gate, begun = threading.Event(), threading.Semaphore(0)
    running, most = [0], [0]
    lock = threading.Lock()

    def piece() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        begun.release()
        gate.wait()
        with lock:
            running[0] -= 1

    queue = WorkQueue(4, "test", max_others=2)
    try:
        ahead = queue.submit([piece] * 6, urgent=False)
        for _ in range(2):
            assert begun.acquire(timeout=30)
        queue.submit([lambda: None], urgent=True).wait()
        assert most == [2]
        ahead.promote()
        for _ in range(2):
            assert begun.acquire(timeout=30)
        assert most == [4]
        gate.set()
        ahead.wait()
    finally:
        gate.set()
        queue.close()
