"""The ring copier over a link that carries as late as it can: order, staging, priority, failure."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from fake_link import LazyLink, make_ring_copier
from patience import PATIENCE_S

from offmoe.tiers.copier import CancelledMoveError, Ticket
from offmoe.tiers.ring import MAX_IN_FLIGHT, RING_CHUNKS, RingCopier

CHUNK = 16
WORKER = "offmoe-link-0"


def numbers(num_bytes: int, *, first: int = 1) -> torch.Tensor:
    return (torch.arange(num_bytes) + first).to(torch.uint8)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


class Stops:
    """The worker stops before it queues a chunk, until the test lets it go on."""

    def __init__(self, link: LazyLink) -> None:
        self._begun, self._may_go = threading.Semaphore(0), threading.Semaphore(0)
        link.on_begin = self._stop  # type: ignore[method-assign]

    def _stop(self) -> None:
        if threading.current_thread().name == WORKER:
            self._begun.release()
            assert self._may_go.acquire(timeout=PATIENCE_S)

    def wait_for_stop(self) -> None:
        assert self._begun.acquire(timeout=PATIENCE_S)

    def let_go(self, chunks: int = 1) -> None:
        self._may_go.release(chunks)


@pytest.fixture
def link() -> LazyLink:
    return LazyLink()


@pytest.fixture
def copier(link: LazyLink) -> Iterator[RingCopier]:
    made = make_ring_copier(link, chunk_bytes=CHUNK)
    yield made
    made.close()


@pytest.fixture
def stops(link: LazyLink, copier: RingCopier) -> Iterator[Stops]:
    made = Stops(link)
    yield made
    made.let_go(1000)


def copy(copier: RingCopier, src: torch.Tensor, dst: torch.Tensor, *, urgent: bool, after: object = None) -> Ticket:
    return copier.copy([(src, dst)], urgent=urgent, after=after)


@pytest.mark.parametrize("ring_chunks", [0, 1, 3])
@pytest.mark.parametrize("urgent", [True, False])
def test_a_ring_chunk_is_not_used_again_before_it_was_read(link: LazyLink, ring_chunks: int, urgent: bool) -> None:
    """The link reads a source only when somebody waits: too early a reuse would show in the bytes."""
    copier = make_ring_copier(link, chunk_bytes=CHUNK, ring_chunks=ring_chunks)
    dst = zeros(5, 100)
    sources = [numbers(100, first=idx) for idx in range(5)]
    tickets = [copy(copier, src, row, urgent=urgent) for src, row in zip(sources, dst, strict=True)]
    for ticket in tickets:
        ticket.wait()
    assert torch.equal(dst, torch.stack(sources))
    assert [num_bytes for _, num_bytes, _ in link.begun] == [16] * 6 + [4] + ([16] * 6 + [4]) * 4
    copier.close()


def test_what_is_not_urgent_leaves_the_device_queue_short(copier: RingCopier, link: LazyLink) -> None:
    src = numbers(10 * CHUNK)
    link.pinned = (src,)
    copy(copier, src, zeros(10 * CHUNK), urgent=False).wait()
    assert link.most_in_flight == MAX_IN_FLIGHT
    assert set(link.threads) == {WORKER}


def test_an_expert_in_pinned_memory_is_one_piece_of_work(link: LazyLink) -> None:
    """However many sources it has: Python does not touch it again."""
    copier = RingCopier(link, None, chunk_bytes=CHUNK, pinned_chunk_bytes=10 * CHUNK)
    sources, dst = numbers(12 * CHUNK).view(3, 4 * CHUNK), zeros(6, 4 * CHUNK)
    link.pinned = (sources,)
    tickets = []
    for begin in (0, 3):
        parts = [(sources[idx], dst[begin + idx]) for idx in range(2)]
        tickets.append(copier.copy(parts, urgent=False))
    for ticket in tickets:
        ticket.wait()
    assert [num_bytes for _, num_bytes, _ in link.begun] == [8 * CHUNK] * 2
    assert torch.equal(dst[0:2], sources[:2]) and torch.equal(dst[3:5], sources[:2])
    copier.close()


def test_small_copies_from_pinned_memory_may_be_many_at_once(link: LazyLink) -> None:
    copier = RingCopier(link, None, chunk_bytes=CHUNK, pinned_chunk_bytes=5 * CHUNK)
    src, dst = numbers(CHUNK), zeros(12, CHUNK)
    link.pinned = (src,)
    for ticket in [copy(copier, src, row, urgent=False) for row in dst]:
        ticket.wait()
    assert link.most_in_flight == 5
    assert dst.eq(src).all()
    copier.close()


def test_urgent_copies_from_pinned_memory_are_queued_at_once_and_whole(
    copier: RingCopier, link: LazyLink, stops: Stops
) -> None:
    src, dst = numbers(10 * CHUNK), zeros(2, 10 * CHUNK)
    link.pinned = (src,)
    slow = copy(copier, src, dst[0], urgent=False)
    stops.wait_for_stop()
    urgent = copy(copier, src, dst[1], urgent=True, after="mark")
    assert link.begun == [(True, 10 * CHUNK, "mark")] and link.threads == ["MainThread"]
    assert not urgent.done() and not urgent.cancel()
    urgent.promote()
    urgent.wait()
    assert urgent.done() and torch.equal(dst[1], src) and link.num_orders == 1
    assert dst[0].eq(0).all() and not slow.done()
    stops.let_go(100)
    slow.wait()
    assert torch.equal(dst[0], src)


@pytest.mark.parametrize("how", ["urgent from the start", "promoted"])
def test_urgent_copies_from_other_memory_overtake_between_chunks(
    copier: RingCopier, link: LazyLink, stops: Stops, how: str
) -> None:
    dst = zeros(2, 4 * CHUNK)
    slow = copy(copier, numbers(4 * CHUNK), dst[0], urgent=False, after="slow")
    stops.wait_for_stop()
    fast = copy(copier, numbers(4 * CHUNK, first=9), dst[1], urgent=how != "promoted", after="fast")
    fast.promote()
    stops.let_go(100)
    for ticket in (fast, slow):
        ticket.wait()
    assert [(urgent, after) for urgent, _, after in link.begun] == [
        (False, "slow"), *[(True, "fast")] * 4, *[(False, "slow")] * 3,
    ]  # fmt: skip
    assert torch.equal(dst, torch.stack([numbers(4 * CHUNK), numbers(4 * CHUNK, first=9)]))


def test_a_copy_promoted_half_way_waits_for_both_lanes(copier: RingCopier, link: LazyLink, stops: Stops) -> None:
    dst = zeros(4 * CHUNK)
    ticket = copy(copier, numbers(4 * CHUNK), dst, urgent=False, after="mark")
    stops.wait_for_stop()
    stops.let_go()
    stops.wait_for_stop()
    ticket.promote()
    stops.let_go(100)
    ticket.wait()
    assert [(urgent, after) for urgent, _, after in link.begun] == [(False, "mark")] * 2 + [(True, "mark")] * 2
    assert torch.equal(dst, numbers(4 * CHUNK)) and link.num_orders == 2


def test_a_cancelled_copy_is_over_when_its_chunks_are_off_the_link(
    copier: RingCopier, link: LazyLink, stops: Stops
) -> None:
    dst = zeros(4 * CHUNK)
    ticket = copy(copier, numbers(4 * CHUNK), dst, urgent=False)
    stops.wait_for_stop()
    assert ticket.cancel()
    stops.let_go(100)
    with pytest.raises(CancelledMoveError):
        ticket.wait()
    assert ticket.done()
    assert torch.equal(dst[:CHUNK], numbers(CHUNK)) and dst[CHUNK:].eq(0).all()
    assert link.num_orders == 0


def test_an_arrival_is_not_done_because_it_is_queued(copier: RingCopier, link: LazyLink) -> None:
    src, dst = numbers(CHUNK), zeros(CHUNK)
    ticket = copy(copier, src, dst, urgent=True)
    copy(copier, src, zeros(CHUNK), urgent=False).job.wait()  # type: ignore[attr-defined]
    assert not ticket.done() and dst.eq(0).all()
    link.synchronize()
    assert ticket.done()


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("urgent", [True, False])
def test_a_link_that_fails_is_told_by_the_wait(copier: RingCopier, link: LazyLink, pinned: bool, urgent: bool) -> None:
    src = numbers(RING_CHUNKS * CHUNK * 2)
    link.pinned = (src,) if pinned else ()
    link.fails_at = 0 if pinned and urgent else 1
    ticket = copy(copier, src, zeros(src.nbytes), urgent=urgent)
    for _ in range(2):
        with pytest.raises(OSError, match="the link broke"):
            ticket.wait()
        assert ticket.done() and not ticket.cancel()
    link.fails_at = -1
    dst = zeros(src.nbytes)
    copy(copier, src, dst, urgent=urgent).wait()
    assert torch.equal(dst, src)


def test_a_restart_ends_what_is_queued_on_the_link_too(copier: RingCopier, link: LazyLink, stops: Stops) -> None:
    src, dst = numbers(4 * CHUNK), zeros(2, 4 * CHUNK)
    link.pinned = (src,)
    lost = [copy(copier, src, dst[0], urgent=True), copy(copier, src, dst[1], urgent=False)]
    stops.wait_for_stop()
    restarting = threading.Thread(target=copier.restart)
    restarting.start()
    assert lost[1].cancel()  # or the restart has: it is true either way
    stops.let_go()
    with pytest.raises(CancelledMoveError):
        lost[1].wait()
    restarting.join(PATIENCE_S)
    assert all(ticket.done() for ticket in lost)
    assert torch.equal(dst[0], src) and torch.equal(dst[1, :CHUNK], src[:CHUNK]) and dst[1, CHUNK:].eq(0).all()
    stops.let_go(100)
    copy(copier, src, dst[1], urgent=False).wait()
    assert torch.equal(dst[1], src)


@pytest.mark.parametrize("urgent", [True, False])
def test_nothing_is_copied_after_close(copier: RingCopier, link: LazyLink, urgent: bool) -> None:
    src = numbers(CHUNK)
    link.pinned = (src,)
    assert repr(copier).startswith("<RingCopier [staged | <WorkQueue offmoe-link [1 threads")
    copier.close()
    with pytest.raises(ValueError, match="the copier is closed"):
        copy(copier, src, zeros(CHUNK), urgent=urgent)
    assert not link.begun


def test_marks_are_the_links(copier: RingCopier) -> None:
    assert [copier.mark(), copier.mark()] == [1, 2]
