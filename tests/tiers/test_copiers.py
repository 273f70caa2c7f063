"""Copiers: one contract for all of them, then what the simulated link promises besides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from fake_link import LazyLink, make_ring_copier
from hypothesis import given, settings
from hypothesis import strategies as st
from inline_copier import DoneTicket, InlineCopier
from patience import PATIENCE_S

from offmoe.tiers.copier import CancelledMoveError, Copier, CopyPart, Ticket, count_bytes, split
from offmoe.tiers.throttled import ThrottledCopier


def make_throttled() -> ThrottledCopier:
    return ThrottledCopier(bytes_per_s=1e9, latency_s=1.0, chunk_bytes=16, sleep=lambda seconds: None)


class PinnedLink(LazyLink):
    """Reads all memory itself."""

    def reads(self, parts: Sequence[CopyPart]) -> bool:
        return True


COPIERS: dict[str, Callable[[], Copier]] = {
    "inline": InlineCopier,
    "throttled": make_throttled,
    "ring": lambda: make_ring_copier(LazyLink(), chunk_bytes=16),
    "ring, pinned": lambda: make_ring_copier(PinnedLink(), chunk_bytes=16),
    "ring, no staging": lambda: make_ring_copier(LazyLink(), chunk_bytes=16, ring_chunks=0),
}


@pytest.fixture(params=COPIERS)
def copier(request: pytest.FixtureRequest) -> Iterator[Copier]:
    made = COPIERS[request.param]()
    yield made
    made.close()


def numbers(num_bytes: int, *, first: int = 0) -> torch.Tensor:
    return (torch.arange(num_bytes) + first).to(torch.uint8)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


@pytest.mark.parametrize("urgent", [True, False])
def test_bytes_arrive(copier: Copier, urgent: bool) -> None:
    src, dst = numbers(1000), zeros(1000)
    ticket = copier.copy([(src, dst)], urgent=urgent, after=copier.mark())
    ticket.wait()
    assert ticket.done()
    assert torch.equal(dst, numbers(1000))
    assert torch.equal(src, numbers(1000))


def test_waiting_twice(copier: Copier) -> None:
    ticket = copier.copy([(numbers(8), zeros(8))])
    ticket.wait()
    ticket.wait()
    assert ticket.done()


def test_an_ended_copy_is_not_taken_back(copier: Copier) -> None:
    ticket = copier.copy([(numbers(8), zeros(8))], urgent=False)
    ticket.wait()
    ticket.promote()
    assert not ticket.cancel()
    ticket.wait()


def test_only_the_destinations_are_written(copier: Copier) -> None:
    slab = torch.full((60,), 255, dtype=torch.uint8)
    copier.copy([(numbers(10), slab[10:20]), (numbers(20, first=7), slab[30:50])]).wait()
    assert torch.equal(slab[10:20], numbers(10)) and torch.equal(slab[30:50], numbers(20, first=7))
    assert torch.cat([slab[:10], slab[20:30], slab[50:]]).eq(255).all()


def test_many_copies(copier: Copier) -> None:
    dst = zeros(16, 64)
    tickets = [copier.copy([(numbers(64, first=row), dst[row])], urgent=row % 3 == 0) for row in range(16)]
    for ticket in reversed(tickets):
        ticket.wait()
    assert torch.equal(dst, torch.stack([numbers(64, first=row) for row in range(16)]))


@pytest.mark.parametrize("num_parts", [0, 1, 3])
def test_nothing_to_copy(copier: Copier, num_parts: int) -> None:
    ticket = copier.copy([(numbers(0), numbers(0))] * num_parts)
    ticket.wait()
    assert ticket.done() and not ticket.cancel()


@pytest.mark.parametrize(
    ("src", "dst", "says"),
    [
        (zeros(4), zeros(5), "4 bytes of torch.uint8 over 5 bytes"),
        (torch.zeros(4), torch.zeros(4), "16 bytes of torch.float32 over 16 bytes of torch.float32"),
        (zeros(4), torch.zeros(1), "4 bytes of torch.uint8 over 4 bytes of torch.float32"),
        (zeros(8)[::2], zeros(4), "contiguous"),
        (zeros(4), zeros(8)[::2], "contiguous"),
        (zeros(2, 4), zeros(2, 4), "one dimension"),
    ],
    ids=["larger", "no bytes", "other type", "strided source", "strided destination", "matrix"],
)
def test_what_cannot_be_copied_is_refused_at_once(
    copier: Copier, src: torch.Tensor, dst: torch.Tensor, says: str
) -> None:
    first = zeros(4)
    with pytest.raises(ValueError, match=says):
        copier.copy([(numbers(4, first=1), first), (src, dst)])
    assert first.eq(0).all()


def test_what_was_started_is_finished_by_close(copier: Copier) -> None:
    dst = zeros(4, 10)
    tickets = [copier.copy([(numbers(10, first=1), row)], urgent=False) for row in dst]
    copier.close()
    assert all(ticket.done() for ticket in tickets)
    assert torch.equal(dst, numbers(10, first=1).expand(4, 10))
    copier.close()


def test_after_a_restart_nothing_is_under_way_and_copies_go_on(copier: Copier) -> None:
    dst = zeros(40, 100)
    tickets = [copier.copy([(numbers(100, first=1), row)], urgent=False) for row in dst]
    copier.restart()
    assert all(ticket.done() for ticket in tickets)
    arrived = dst.clone()
    copier.copy([(numbers(100, first=1), dst[0])]).wait()
    assert torch.equal(dst[0], numbers(100, first=1))
    assert torch.equal(dst[1:], arrived[1:])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), min_size=1, max_size=8),
    steps=st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["wait", "cancel", "promote"])), max_size=12),
    urgent=st.lists(st.booleans(), min_size=8, max_size=8),
    name=st.sampled_from(sorted(COPIERS)),
)
def test_cancelled_copies_never_write_after_the_wait_and_the_others_are_right(
    sizes: list[list[int]], steps: list[tuple[int, str]], urgent: list[bool], name: str
) -> None:
    copier = COPIERS[name]()
    copies = [[(numbers(size, first=idx), zeros(size)) for size in parts] for idx, parts in enumerate(sizes)]
    tickets = [copier.copy(parts, urgent=fast) for parts, fast in zip(copies, urgent, strict=False)]
    cancelled: dict[int, list[torch.Tensor]] = {}
    for idx, step in steps:
        if idx >= len(tickets) or idx in cancelled:
            continue
        if step == "cancel" and tickets[idx].cancel():
            with pytest.raises(CancelledMoveError):
                tickets[idx].wait()
            assert tickets[idx].done()
            cancelled[idx] = [dst.clone() for _, dst in copies[idx]]
        elif step == "promote":
            tickets[idx].promote()
        elif step == "wait":
            tickets[idx].wait()
            assert all(torch.equal(src, dst) for src, dst in copies[idx])
    copier.close()
    for idx, parts in enumerate(copies):
        expected = cancelled.get(idx, [src for src, _ in parts])
        assert all(torch.equal(dst, want) for (_, dst), want in zip(parts, expected, strict=True))


@given(sizes=st.lists(st.integers(0, 40), max_size=6), chunk_bytes=st.integers(1, 20))
def test_chunks_are_full_and_cover_the_parts_in_order(sizes: list[int], chunk_bytes: int) -> None:
    parts: list[CopyPart] = [(numbers(size, first=idx), zeros(size)) for idx, size in enumerate(sizes)]
    chunks = list(split(parts, chunk_bytes))
    assert [count_bytes(chunk) for chunk in chunks[:-1]] == [chunk_bytes] * (len(chunks) - 1)
    assert all(0 < count_bytes(chunk) <= chunk_bytes for chunk in chunks)
    for chunk in chunks:
        for src, dst in chunk:
            dst.copy_(src)
    assert all(torch.equal(src, dst) for src, dst in parts)
    assert sum(count_bytes(chunk) for chunk in chunks) == sum(sizes)


class Link:
    """Time on the simulated link: a transfer begins, and ends when the test says so; no other time passes."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.seconds: list[float] = []
        self.chunks: list[tuple[int, int]] = []
        self._begun, self._may_end = threading.Semaphore(0), threading.Semaphore(0)

    def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self._begun.release()
        assert self._may_end.acquire(timeout=PATIENCE_S)
        self.now_s += seconds

    def wait_for_begin(self) -> None:
        assert self._begun.acquire(timeout=PATIENCE_S)

    def let_end(self, transfers: int = 1) -> None:
        self._may_end.release(transfers)

    def arrived(self, copy_idx: int, num_bytes: int) -> None:
        self.chunks.append((copy_idx, num_bytes))


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def throttled(link: Link) -> Iterator[ThrottledCopier]:
    """Half a second, then 128 bytes a second in chunks of 32."""
    copier = ThrottledCopier(
        bytes_per_s=128.0, latency_s=0.5, chunk_bytes=32, sleep=link.sleep, clock=lambda: link.now_s,
        on_chunk=link.arrived,
    )  # fmt: skip
    yield copier
    link.let_end(1000)
    copier.close()


def copy(copier: Copier, dst: torch.Tensor, *, urgent: bool = True) -> Ticket:
    return copier.copy([(numbers(dst.nbytes, first=1), dst)], urgent=urgent)


def test_bytes_are_not_visible_before_the_transfer_ends(throttled: ThrottledCopier, link: Link) -> None:
    dst = zeros(48)
    ticket = copy(throttled, dst)
    link.wait_for_begin()
    assert not ticket.done()
    assert dst.eq(0).all()
    link.let_end()
    link.wait_for_begin()
    assert not ticket.done()
    assert torch.equal(dst[:32], numbers(32, first=1)) and dst[32:].eq(0).all()
    link.let_end()
    ticket.wait()
    assert torch.equal(dst, numbers(48, first=1))
    assert link.seconds == [0.5 + 32 / 128, 16 / 128]
    assert throttled.carried_bytes == 48
    assert link.chunks == [(0, 32), (0, 16)]


def test_one_copy_at_a_time_in_the_order_of_the_calls(throttled: ThrottledCopier, link: Link) -> None:
    dst = zeros(3, 10)
    tickets = [copy(throttled, row) for row in dst]
    for num_ended in range(3):
        link.wait_for_begin()
        assert [ticket.done() for ticket in tickets] == [idx < num_ended for idx in range(3)]
        assert [bool(row.any()) for row in dst] == [idx < num_ended for idx in range(3)]
        link.let_end()
    tickets[2].wait()
    assert link.chunks == [(0, 10), (1, 10), (2, 10)]


@pytest.mark.parametrize("how", ["urgent from the start", "promoted"])
def test_an_urgent_copy_overtakes_between_chunks(throttled: ThrottledCopier, link: Link, how: str) -> None:
    dst = zeros(3, 64)
    tickets = [copy(throttled, row, urgent=False) for row in dst[:2]]
    link.wait_for_begin()
    tickets.append(copy(throttled, dst[2], urgent=how != "promoted"))
    if how == "promoted":
        tickets.append(copy(throttled, zeros(32), urgent=False))
        tickets[2].promote()
        tickets[2].promote()
    link.let_end(100)
    for ticket in tickets:
        ticket.wait()
    assert link.chunks[:6] == [(0, 32), (2, 32), (2, 32), (0, 32), (1, 32), (1, 32)]
    assert torch.equal(dst, numbers(64, first=1).expand(3, 64))


def test_a_copy_cancelled_in_the_queue_never_writes(throttled: ThrottledCopier, link: Link) -> None:
    dst = zeros(3, 10)
    first, cancelled, last = [copy(throttled, row) for row in dst]
    link.wait_for_begin()
    assert cancelled.cancel()
    assert cancelled.done()
    for _ in range(2):
        with pytest.raises(CancelledMoveError):
            cancelled.wait()
    assert cancelled.cancel()
    link.let_end(2)
    first.wait()
    last.wait()
    assert [bool(row.any()) for row in dst] == [True, False, True]
    assert link.chunks == [(0, 10), (2, 10)]


def test_a_copy_cancelled_under_way_ends_its_chunk(throttled: ThrottledCopier, link: Link) -> None:
    dst = zeros(96)
    ticket = copy(throttled, dst)
    link.wait_for_begin()
    assert ticket.cancel()
    assert not ticket.done()
    link.let_end()
    with pytest.raises(CancelledMoveError):
        ticket.wait()
    assert ticket.done()
    assert dst[:32].any() and dst[32:].eq(0).all()


def test_a_copy_whose_last_chunk_has_begun_cannot_be_cancelled(throttled: ThrottledCopier, link: Link) -> None:
    dst = zeros(10)
    ticket = copy(throttled, dst)
    link.wait_for_begin()
    assert not ticket.cancel()
    assert not ticket.done()
    link.let_end()
    ticket.wait()
    assert torch.equal(dst, numbers(10, first=1))
    assert not ticket.cancel()


def test_a_sleep_that_was_too_long_is_made_up_for(throttled: ThrottledCopier, link: Link) -> None:
    ticket = copy(throttled, zeros(96))
    link.wait_for_begin()
    link.now_s += 0.125
    link.let_end(3)
    ticket.wait()
    assert link.seconds == [0.75, 0.125, 0.25]


def test_an_idle_link_saves_no_time_up(throttled: ThrottledCopier, link: Link) -> None:
    link.let_end(2)
    copy(throttled, zeros(32)).wait()
    link.now_s += 50
    copy(throttled, zeros(32)).wait()
    assert link.seconds == [0.75, 0.75]


def test_close_carries_the_queue_and_ends_the_thread(throttled: ThrottledCopier, link: Link) -> None:
    dst = zeros(3, 10)
    tickets = [copy(throttled, row, urgent=False) for row in dst]
    closing = threading.Thread(target=throttled.close)
    closing.start()
    link.wait_for_begin()
    assert closing.is_alive()
    link.let_end(3)
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert all(ticket.done() for ticket in tickets) and dst.any(dim=1).all()
    with pytest.raises(ValueError, match="closed"):
        copy(throttled, dst[0])


def test_a_restart_takes_back_what_is_queued(throttled: ThrottledCopier, link: Link) -> None:
    dst = zeros(3, 32)
    tickets = [copy(throttled, row) for row in dst]
    link.wait_for_begin()
    restarting = threading.Thread(target=throttled.restart)
    restarting.start()
    with pytest.raises(CancelledMoveError):
        tickets[2].wait()
    assert restarting.is_alive()
    link.let_end()
    restarting.join(PATIENCE_S)
    tickets[0].wait()
    assert [bool(row.any()) for row in dst] == [True, False, False]
    link.let_end()
    copy(throttled, dst[1]).wait()


@pytest.mark.parametrize("bytes_per_s", [0.0, -1.0])
def test_a_link_has_a_speed(bytes_per_s: float) -> None:
    with pytest.raises(ValueError, match=f"bytes_per_s is {bytes_per_s}"):
        ThrottledCopier(bytes_per_s=bytes_per_s)


def test_a_ticket_of_nothing() -> None:
    ticket = DoneTicket()
    ticket.wait()
    ticket.promote()
    assert ticket.done() and not ticket.cancel()
