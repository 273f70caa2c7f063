"""The disk tier and its files: the right bytes on every system, and a clear error when the drive or the file fails."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from makers import one_line
from patience import PATIENCE_S

from offmoe.checkpoint.expert_index import BUFFERED_ALIGN_BYTES, ReadPlan, Span, plan_read
from offmoe.checkpoint.shard_file import DIRECT_ALIGN_BYTES, ShardFile
from offmoe.core.counters import Counters
from offmoe.core.errors import (
    CheckpointChangedError,
    CheckpointError,
    DiskReadError,
    ModelNotFoundError,
    UsageError,
)
from offmoe.tiers import disk as disk_module
from offmoe.tiers.copier import CancelledMoveError, Ticket
from offmoe.tiers.disk import DiskTier
from offmoe.tiers.host import HostPool

# Ends in the middle of a block, so that a direct read of the last bytes passes the end of the file.
FILE_BYTES = 5 * DIRECT_ALIGN_BYTES + 123
DATA = [random.Random(seed).randbytes(FILE_BYTES) for seed in range(2)]
LONG_AGO_NS = 10**18

EXPERTS = {
    "one block": (Span(file_idx=0, start=0, num_bytes=DIRECT_ALIGN_BYTES),),
    "unaligned": (Span(file_idx=0, start=1001, num_bytes=9000),),
    "unaligned end of file": (Span(file_idx=0, start=FILE_BYTES - 100, num_bytes=100),),
    "whole file": (Span(file_idx=0, start=0, num_bytes=FILE_BYTES),),
    "three places": (
        Span(file_idx=1, start=FILE_BYTES - 7000, num_bytes=7000),
        Span(file_idx=0, start=9000, num_bytes=1),
        Span(file_idx=0, start=10, num_bytes=5000),
    ),
}


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[ShardFile]]:
    """Two files, written long ago, so that any later write has another time."""
    with ExitStack() as closing:
        opened = []
        for idx, data in enumerate(DATA):
            path = tmp_path / f"{idx}.safetensors"
            path.write_bytes(data)
            os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
            opened.append(ShardFile(path))
            closing.callback(opened[-1].close)
        yield opened


@pytest.fixture
def make_disk(files: list[ShardFile]) -> Iterator[Callable[[str], DiskTier]]:
    with ExitStack() as closing:

        def make(io: str) -> DiskTier:
            disk = DiskTier(files, io=io, counters=Counters())
            closing.callback(disk.close)
            return disk

        yield make


@pytest.fixture(params=["direct", "buffered"])
def disk(request: pytest.FixtureRequest, make_disk: Callable[[str], DiskTier]) -> DiskTier:
    """Both ways of reading; direct only where the system has it."""
    made = make_disk("auto" if request.param == "direct" else "buffered")
    if request.param == "direct" and not made.direct:
        pytest.skip("no direct reads here")
    return made


def read_expert(disk: DiskTier, spans: tuple[Span, ...]) -> list[bytes]:
    """The bytes of each source, through a slot."""
    plan = plan_read(spans, align_bytes=disk.align_bytes)
    slot = HostPool(num_slots=1, slot_bytes=plan.slot_bytes).memory(0)
    slot[:] = b"\xee" * len(slot)
    disk.read(plan, slot).wait()
    return [
        bytes(slot[offset : offset + span.num_bytes]) for offset, span in zip(plan.source_offsets, spans, strict=True)
    ]


def expected(spans: tuple[Span, ...]) -> list[bytes]:
    return [DATA[span.file_idx][span.start : span.start + span.num_bytes] for span in spans]


@pytest.mark.parametrize("spans", EXPERTS.values(), ids=EXPERTS)
def test_the_bytes_of_the_file_arrive(disk: DiskTier, spans: tuple[Span, ...]) -> None:
    assert read_expert(disk, spans) == expected(spans)


@pytest.mark.parametrize("spans", EXPERTS.values(), ids=EXPERTS)
def test_large_runs_are_read_in_pieces(
    disk: DiskTier, spans: tuple[Span, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "PIECE_BYTES", DIRECT_ALIGN_BYTES)
    assert read_expert(disk, spans) == expected(spans)


def test_bytes_and_reads_are_counted(make_disk: Callable[[str], DiskTier], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "PIECE_BYTES", DIRECT_ALIGN_BYTES)
    disk = make_disk("buffered")
    read_expert(disk, EXPERTS["three places"])
    blocks = [-(-FILE_BYTES // 64) - (FILE_BYTES - 7000) // 64, 1, -(-5010 // 64)]
    assert (disk._counters.disk_bytes, disk._counters.disk_reads) == (64 * sum(blocks), 2 + 1 + 2)


def test_direct_reads_count_the_blocks_they_move(make_disk: Callable[[str], DiskTier]) -> None:
    disk = make_disk("auto")
    if not disk.direct:
        pytest.skip("no direct reads here")
    read_expert(disk, EXPERTS["three places"])
    assert disk._counters.disk_bytes % DIRECT_ALIGN_BYTES == 0
    assert disk._counters.disk_bytes == 3 * DIRECT_ALIGN_BYTES + DIRECT_ALIGN_BYTES + 2 * DIRECT_ALIGN_BYTES


def test_many_reads_at_once(disk: DiskTier) -> None:
    spans = [(Span(file_idx=i % 2, start=i * 37, num_bytes=3000 + i),) for i in range(60)]
    plans = [plan_read(each, align_bytes=disk.align_bytes) for each in spans]
    pool = HostPool(num_slots=len(spans), slot_bytes=3 * DIRECT_ALIGN_BYTES)
    tickets = [disk.read(plan, pool.memory(slot)) for slot, plan in enumerate(plans)]
    for slot, (each, plan, ticket) in enumerate(zip(spans, plans, tickets, strict=True)):
        ticket.wait()
        assert ticket.done()
        begin = plan.source_offsets[0]
        assert [bytes(pool.memory(slot)[begin : begin + each[0].num_bytes])] == expected(each)


@pytest.fixture(params=["no O_DIRECT", "no preadv", "neither"])
def poor_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What macOS, Windows and old systems lack."""
    if request.param != "no preadv":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    if request.param != "no O_DIRECT":
        monkeypatch.delattr(os, "preadv", raising=False)


@pytest.mark.usefixtures("poor_system")
@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_systems_without_direct_or_positional_reads(
    io: str, make_disk: Callable[[str], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "PIECE_BYTES", 1000)
    disk = make_disk(io)
    assert repr(disk) == "<DiskTier [2 files, buffered]>"
    for spans in EXPERTS.values():
        assert read_expert(disk, spans) == expected(spans)


@pytest.mark.usefixtures("poor_system")
def test_direct_is_refused_where_the_system_has_none(make_disk: Callable[[str], DiskTier]) -> None:
    with pytest.raises(UsageError, match="use --io buffered"):
        make_disk("direct")


def test_auto_falls_back_where_the_file_system_refuses(
    make_disk: Callable[[str], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardFile, "open_direct", lambda self: self.name == "0.safetensors")
    with pytest.raises(UsageError) as caught:
        make_disk("direct")
    assert "without direct reads; use --io buffered" in one_line(caught)
    disk = make_disk("auto")
    assert not disk.direct and disk.align_bytes == BUFFERED_ALIGN_BYTES
    assert read_expert(disk, EXPERTS["three places"]) == expected(EXPERTS["three places"])


def test_unknown_io_lists_the_known(make_disk: Callable[[str], DiskTier]) -> None:
    with pytest.raises(UsageError, match="io is 'mmap'; known: auto, direct, buffered"):
        make_disk("mmap")


def test_a_range_behind_the_end_of_the_file(disk: DiskTier) -> None:
    spans = (Span(file_idx=1, start=FILE_BYTES - 100, num_bytes=DIRECT_ALIGN_BYTES),)
    with pytest.raises(DiskReadError) as caught:
        read_expert(disk, spans)
    message = one_line(caught)
    assert f"1.safetensors ended {DIRECT_ALIGN_BYTES - 100} bytes early at byte {FILE_BYTES}" in message


def test_a_failing_drive_names_file_and_byte(disk: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: ShardFile, view: memoryview, start: int, *, direct: bool) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ShardFile, "_read_once", fail)
    with pytest.raises(DiskReadError) as caught:
        read_expert(disk, (Span(file_idx=0, start=DIRECT_ALIGN_BYTES, num_bytes=10),))
    assert "0.safetensors at byte 4096 failed: Input/output error" in one_line(caught)


def test_reads_that_return_less_than_asked_go_on(
    make_disk: Callable[[str], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ShardFile._read_once
    monkeypatch.setattr(
        ShardFile, "_read_once", lambda self, view, start, *, direct: whole(self, view[:1000], start, direct=direct)
    )
    assert read_expert(make_disk("buffered"), EXPERTS["whole file"]) == expected(EXPERTS["whole file"])


def test_waiting_ends_only_when_every_piece_has(
    make_disk: Callable[[str], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed piece must not let the slot go while other pieces still write to it."""
    ended, may_end = [], threading.Event()

    def read_into(file: ShardFile, view: memoryview, start: int, *, need_bytes: int, direct: bool) -> None:
        if start == 0:
            raise DiskReadError("the first piece failed")
        assert may_end.wait(PATIENCE_S)
        ended.append(start)

    monkeypatch.setattr(ShardFile, "read_into", read_into)
    monkeypatch.setattr(disk_module, "PIECE_BYTES", DIRECT_ALIGN_BYTES)
    plan = plan_read(EXPERTS["whole file"], align_bytes=1)
    ticket = make_disk("buffered").read(plan, memoryview(bytearray(plan.slot_bytes)))
    assert not ticket.done()
    may_end.set()
    with pytest.raises(DiskReadError, match="the first piece failed"):
        ticket.wait()
    assert sorted(ended) == [DIRECT_ALIGN_BYTES * i for i in range(1, 6)]
    assert ticket.done()
    with pytest.raises(DiskReadError):  # a second wait says the same
        ticket.wait()


def replaced(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(bytes(FILE_BYTES))
    os.utime(new, ns=(LONG_AGO_NS, LONG_AGO_NS))
    new.rename(path)


def rewritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(FILE_BYTES))


def cut(path: Path) -> None:
    os.truncate(path, 100)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))


CHANGES = [replaced, rewritten, cut, Path.unlink]


@pytest.mark.parametrize("change", CHANGES, ids=["replaced", "rewritten", "cut", "removed"])
def test_a_file_that_changes_during_a_run(
    disk: DiskTier, files: list[ShardFile], change: Callable[[Path], None]
) -> None:
    assert read_expert(disk, EXPERTS["unaligned"]) == expected(EXPERTS["unaligned"])
    change(files[0].path)
    with pytest.raises(CheckpointChangedError) as caught:
        read_expert(disk, EXPERTS["unaligned"])
    assert f"{files[0].path} was replaced or removed while in use" in one_line(caught)


@pytest.mark.parametrize("change", [replaced, rewritten, cut], ids=["replaced", "rewritten", "cut"])
def test_a_file_that_changes_before_direct_reads_open(
    make_disk: Callable[[str], DiskTier], files: list[ShardFile], change: Callable[[Path], None]
) -> None:
    if not files[1].open_direct():
        pytest.skip("no direct reads here")
    change(files[0].path)
    with pytest.raises(CheckpointChangedError):
        make_disk("auto")


def test_threads_end_on_close(files: list[ShardFile]) -> None:
    before = set(threading.enumerate())
    disk = DiskTier(files, io="auto", counters=Counters())
    for spans in EXPERTS.values():
        read_expert(disk, spans)
    assert any(thread.name.startswith("offmoe-disk") for thread in set(threading.enumerate()) - before)
    disk.close()
    assert set(threading.enumerate()) <= before


def test_close_drops_reads_that_were_queued(files: list[ShardFile], monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_end = [], threading.Event()

    def read_into(file: ShardFile, view: memoryview, start: int, *, need_bytes: int, direct: bool) -> None:
        began.append(start)
        assert may_end.wait(PATIENCE_S)

    monkeypatch.setattr(ShardFile, "read_into", read_into)
    disk = DiskTier(files, io="buffered", counters=Counters())
    plan = plan_read(EXPERTS["one block"], align_bytes=1)
    tickets = [disk.read(plan, memoryview(bytearray(plan.slot_bytes))) for _ in range(3 * disk_module.NUM_THREADS)]
    closing = threading.Thread(target=disk.close)
    closing.start()
    with pytest.raises(CancelledMoveError):
        tickets[-1].wait()
    may_end.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert len(began) <= disk_module.NUM_THREADS
    assert all(ticket.done() for ticket in tickets)


class Gate:
    """Holds every read until the test lets it go, and writes down where each begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began: list[int] = []
        self.begun, self.may_end = threading.Semaphore(0), threading.Semaphore(0)
        monkeypatch.setattr(ShardFile, "read_into", self._read_into)

    def _read_into(self, view: memoryview, start: int, *, need_bytes: int, direct: bool) -> None:
        self.began.append(start)
        self.begun.release()
        assert self.may_end.acquire(timeout=PATIENCE_S)
        view[:] = b"\x01" * len(view)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def begin(disk: DiskTier, start: int, *, urgent: bool) -> tuple[Ticket, bytearray]:
    plan = plan_read((Span(file_idx=0, start=start, num_bytes=100),), align_bytes=1)
    slot = bytearray(plan.slot_bytes)
    return disk.read(plan, memoryview(slot), urgent=urgent), slot


def test_urgent_reads_overtake_those_that_wait(files: list[ShardFile], gate: Gate) -> None:
    disk = DiskTier(files, io="buffered", counters=Counters())
    num_busy = disk_module.MAX_PIECES_AHEAD
    tickets = [begin(disk, start, urgent=False)[0] for start in range(num_busy + 2)]
    for _ in range(num_busy):
        assert gate.begun.acquire(timeout=PATIENCE_S)
    tickets.append(begin(disk, 1000, urgent=True)[0])
    assert gate.begun.acquire(timeout=PATIENCE_S)  # there are threads left for it
    tickets[num_busy + 1].promote()
    assert gate.begun.acquire(timeout=PATIENCE_S)
    gate.may_end.release(100)
    for ticket in tickets:
        ticket.wait()
    assert gate.began[num_busy:] == [1000, num_busy + 1, num_busy]
    disk.close()


def test_a_restart_ends_every_read_and_reads_go_on(files: list[ShardFile], gate: Gate) -> None:
    """After Ctrl-C: a ticket may be lost, and its slot is given to another."""
    disk = DiskTier(files, io="buffered", counters=Counters())
    reads = [begin(disk, start, urgent=bool(start % 2)) for start in range(2 * disk_module.NUM_THREADS)]
    for _ in range(disk_module.NUM_THREADS):
        assert gate.begun.acquire(timeout=PATIENCE_S)
    restarting = threading.Thread(target=disk.restart)
    restarting.start()
    gate.may_end.release(100)
    restarting.join(PATIENCE_S)
    assert not restarting.is_alive()
    began = set(gate.began)
    assert len(began) == disk_module.NUM_THREADS
    for start, (ticket, slot) in enumerate(reads):
        assert ticket.done()
        assert any(slot) == (start in began)
        if start not in began:
            with pytest.raises(CancelledMoveError):
                ticket.wait()
    ticket, slot = begin(disk, 5, urgent=False)
    ticket.wait()
    assert any(slot) and len(gate.began) == disk_module.NUM_THREADS + 1
    disk.close()


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        ShardFile(tmp_path / "none")
    with pytest.raises(CheckpointError) as caught:
        ShardFile(tmp_path)
    assert f"cannot open {tmp_path}" in one_line(caught)


def test_closed_files_do_not_read(files: list[ShardFile]) -> None:
    """A descriptor number may be given to another file after close: nothing may read through the old one."""
    files[0].open_direct()
    files[0].close()
    files[0].close()
    with pytest.raises((ValueError, AssertionError)):
        files[0].read_into(memoryview(bytearray(10)), 0, need_bytes=10)
    assert repr(files[0]) == f"<ShardFile 0.safetensors [{FILE_BYTES} bytes]>"


def test_plans_may_be_empty(make_disk: Callable[[str], DiskTier]) -> None:
    ticket = make_disk("buffered").read(ReadPlan((), (), 0), memoryview(bytearray(0)))
    ticket.wait()
    assert ticket.done()


def test_reads_at_the_same_time_are_busy_once(
    make_disk: Callable[[str], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = iter([100, 400, 1000, 1500])  # of what begins when nothing is under way, and of the last that ends
    monkeypatch.setattr(disk_module.time, "perf_counter_ns", lambda: next(now_ns))
    disk = make_disk("buffered")
    for is_begin in (True, True, False, True, False, False, True, False):
        disk._begin(7) if is_begin else disk._end()
    assert disk._counters.disk_busy_ns == 300 + 500
    assert (disk._counters.disk_reads, disk._counters.disk_bytes) == (4, 28)


def test_a_read_that_fails_is_not_busy_for_ever(disk: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DiskReadError("gone")

    monkeypatch.setattr(ShardFile, "read_into", fail)
    with pytest.raises(DiskReadError):
        read_expert(disk, EXPERTS["one block"])
    assert not disk._under_way and disk._counters.disk_busy_ns > 0
