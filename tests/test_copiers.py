"""Copiers: one contract for all of them, then what the simulated link promises besides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from offmoe.tiers.copier import Copier, DoneTicket, FutureTicket, Ticket
from offmoe.tiers.inline import InlineCopier
from offmoe.tiers.throttled import CancelledCopyError, ThrottledCopier

PATIENCE_S = 20.0

COPIERS: dict[str, Callable[[], Copier]] = {
    "inline": InlineCopier,
    "throttled": lambda: ThrottledCopier(bytes_per_s=1e9, latency_s=1.0, sleep=lambda seconds: None),
}


@pytest.fixture(params=COPIERS)
def copier(request: pytest.FixtureRequest) -> Iterator[Copier]:
    made = COPIERS[request.param]()
    yield made
    made.close()


def numbers(num_bytes: int, *, first: int = 0) -> torch.Tensor:
    return (torch.arange(num_bytes) + first).to(torch.uint8)


def test_bytes_arrive(copier: Copier) -> None:
    src, dst = numbers(1000), torch.zeros(1000, dtype=torch.uint8)
    ticket = copier.copy(src, dst)
    ticket.wait()
    assert ticket.done()
    assert torch.equal(dst, numbers(1000))
    assert torch.equal(src, numbers(1000))


def test_waiting_twice(copier: Copier) -> None:
    ticket = copier.copy(numbers(8), torch.zeros(8, dtype=torch.uint8))
    ticket.wait()
    ticket.wait()
    assert ticket.done()


def test_only_the_destination_is_written(copier: Copier) -> None:
    slab = torch.full((30,), 255, dtype=torch.uint8)
    copier.copy(numbers(10), slab[10:20]).wait()
    assert torch.equal(slab[10:20], numbers(10))
    assert slab[:10].eq(255).all() and slab[20:].eq(255).all()


def test_many_copies(copier: Copier) -> None:
    dst = torch.zeros(16, 64, dtype=torch.uint8)
    tickets = [copier.copy(numbers(64, first=row), dst[row]) for row in range(16)]
    for ticket in reversed(tickets):
        ticket.wait()
    assert torch.equal(dst, torch.stack([numbers(64, first=row) for row in range(16)]))


def test_a_copy_moves_bytes_whatever_the_shapes(copier: Copier) -> None:
    dst = torch.zeros(3, 4, dtype=torch.uint8)
    copier.copy(numbers(12).view(6, 2), dst).wait()
    assert torch.equal(dst.view(-1), numbers(12))


def test_zero_bytes(copier: Copier) -> None:
    copier.copy(numbers(0), numbers(0)).wait()


@pytest.mark.parametrize(
    ("src", "dst", "says"),
    [
        (torch.zeros(4), torch.zeros(5), "16 bytes of torch.float32 over 20 bytes"),
        (torch.zeros(4), torch.zeros(1), "16 bytes of torch.float32 over 4 bytes"),
        (torch.zeros(4), torch.zeros(8, dtype=torch.bfloat16), "16 bytes of torch.bfloat16"),
        (torch.zeros(4, 2).T, torch.zeros(2, 4), "contiguous"),
        (torch.zeros(2, 4), torch.zeros(4, 2).T, "contiguous"),
    ],
    ids=["larger", "smaller", "other type", "strided source", "strided destination"],
)
def test_what_cannot_be_copied_is_refused_at_once(
    copier: Copier, src: torch.Tensor, dst: torch.Tensor, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        copier.copy(src, dst)


def test_what_was_started_is_finished_by_close(copier: Copier) -> None:
    dst = torch.zeros(4, 10, dtype=torch.uint8)
    tickets = [copier.copy(numbers(10, first=1), row) for row in dst]
    copier.close()
    assert all(ticket.done() for ticket in tickets)
    assert torch.equal(dst, numbers(10, first=1).expand(4, 10))
    copier.close()


class Link:
    """A clock for the simulated link: a transfer begins, and ends when the test says so."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun, self._may_end = threading.Semaphore(0), threading.Semaphore(0)

    def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self._begun.release()
        assert self._may_end.acquire(timeout=PATIENCE_S)

    def wait_for_begin(self) -> None:
        assert self._begun.acquire(timeout=PATIENCE_S)

    def let_end(self, transfers: int = 1) -> None:
        self._may_end.release(transfers)


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def throttled(link: Link) -> Iterator[ThrottledCopier]:
    copier = ThrottledCopier(bytes_per_s=100.0, latency_s=0.5, sleep=link.sleep)
    yield copier
    link.let_end(100)
    copier.close()


def test_bytes_are_not_visible_before_the_transfer_ends(throttled: ThrottledCopier, link: Link) -> None:
    dst = torch.zeros(50, dtype=torch.uint8)
    ticket = throttled.copy(numbers(50, first=1), dst)
    link.wait_for_begin()
    assert not ticket.done()
    assert dst.eq(0).all()
    link.let_end()
    ticket.wait()
    assert torch.equal(dst, numbers(50, first=1))
    assert link.seconds == [0.5 + 50 / 100.0]


def test_one_copy_at_a_time_in_the_order_of_the_calls(throttled: ThrottledCopier, link: Link) -> None:
    dst = torch.zeros(3, 10, dtype=torch.uint8)
    tickets = [throttled.copy(numbers(10, first=1), row) for row in dst]
    for num_ended in range(3):
        link.wait_for_begin()
        assert [ticket.done() for ticket in tickets] == [idx < num_ended for idx in range(3)]
        assert [bool(row.any()) for row in dst] == [idx < num_ended for idx in range(3)]
        link.let_end()
    tickets[2].wait()
    assert len(link.seconds) == 3


def test_a_copy_cancelled_in_the_queue_never_writes(throttled: ThrottledCopier, link: Link) -> None:
    dst = torch.zeros(3, 10, dtype=torch.uint8)
    first, cancelled, last = [throttled.copy(numbers(10, first=1), row) for row in dst]
    link.wait_for_begin()
    assert cancelled.cancel()
    assert cancelled.done()
    with pytest.raises(CancelledCopyError):
        cancelled.wait()
    assert cancelled.cancel()
    link.let_end(2)
    first.wait()
    last.wait()
    assert [bool(row.any()) for row in dst] == [True, False, True]
    assert len(link.seconds) == 2


def test_a_copy_that_has_begun_cannot_be_cancelled(throttled: ThrottledCopier, link: Link) -> None:
    dst = torch.zeros(10, dtype=torch.uint8)
    ticket = throttled.copy(numbers(10, first=1), dst)
    link.wait_for_begin()
    assert not ticket.cancel()
    assert not ticket.done()
    link.let_end()
    ticket.wait()
    assert torch.equal(dst, numbers(10, first=1))
    assert not ticket.cancel()


def test_close_carries_the_queue_and_ends_the_thread(throttled: ThrottledCopier, link: Link) -> None:
    dst = torch.zeros(3, 10, dtype=torch.uint8)
    tickets = [throttled.copy(numbers(10, first=1), row) for row in dst]
    closing = threading.Thread(target=throttled.close)
    closing.start()
    link.wait_for_begin()
    assert closing.is_alive()
    link.let_end(3)
    closing.join(PATIENCE_S)
    assert not closing.is_alive() and not throttled._thread.is_alive()
    assert all(ticket.done() for ticket in tickets) and dst.any(dim=1).all()
    with pytest.raises(ValueError, match="the copier is closed"):
        throttled.copy(numbers(10), dst[0])


@pytest.mark.parametrize("bytes_per_s", [0.0, -1.0])
def test_a_link_has_a_speed(bytes_per_s: float) -> None:
    with pytest.raises(ValueError, match=f"bytes_per_s is {bytes_per_s}"):
        ThrottledCopier(bytes_per_s=bytes_per_s)


@pytest.mark.parametrize("ticket", [DoneTicket(), FutureTicket([])], ids=["done", "no pieces"])
def test_tickets_of_nothing(ticket: Ticket) -> None:
    assert ticket.done()
    ticket.wait()
