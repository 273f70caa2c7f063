"""The disk tier: reads experts from the published files straight into slots, on threads.

Concurrency. `read()` is called from the one thread that owns the slot table; pieces run on the tier's own threads,
which do nothing but count and `preadv` (it releases the interpreter lock) into memory that nobody else touches until
the ticket has been waited for. A slot is reused only after its ticket's wait, which waits for every piece.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from offmoe.checkpoint.expert_index import BUFFERED_ALIGN_BYTES, ReadPlan, Run
from offmoe.checkpoint.shard_file import DIRECT_ALIGN_BYTES, ShardFile
from offmoe.core.counters import Counters
from offmoe.core.errors import UsageError
from offmoe.tiers.copier import Ticket
from offmoe.tiers.pieces import NUM_THREADS, PIECE_BYTES, THROUGH_BYTES
from offmoe.tiers.work_queue import WorkQueue

IO_MODES = ("auto", "direct", "buffered")
# Pieces of reads ahead of time at once. An expert of 9.4 MB that is needed now took 4.5 ms on an idle drive and 10.6 ms
# behind eight pieces of 2 MiB; two keep the drive nearly as busy (1.6-2.2 GB/s against 2.0).
MAX_PIECES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Passage:
    """Bytes [start, start + num_bytes) of a file, at most PIECE_BYTES, which are read and given to `take`.

    `take(address)` is called on the thread that read them, and has them until it returns.
    """

    file_idx: int
    start: int
    num_bytes: int
    take: Callable[[int], None]


class DiskTier:
    """Reads from `files`, bypassing the page cache where `io` and the file system allow."""

    def __init__(self, files: Sequence[ShardFile], *, io: str, counters: Counters) -> None:
        """`io`: "auto" (direct where possible), "direct" (UsageError where it is not), "buffered"."""
        if io not in IO_MODES:
            raise UsageError(f"io is {io!r}; known: {', '.join(IO_MODES)}")
        self._files = files
        self._counters = counters
        self._counting = threading.Lock()
        self._under_way = self._busy_since_ns = 0
        self.direct = io != "buffered" and all(file.open_direct() for file in files)
        if io == "direct" and not self.direct:
            raise UsageError(f"{files[0].path.parent} is on a file system without direct reads; use --io buffered")
        self._queue = WorkQueue(NUM_THREADS, "offmoe-disk", max_others=MAX_PIECES_AHEAD)
        self._own = threading.local()

    def __repr__(self) -> str:
        return f"<DiskTier [{len(self._files)} files, {'direct' if self.direct else 'buffered'}]>"

    @property
    def align_bytes(self) -> int:
        """Alignment of runs, in bytes."""
        return DIRECT_ALIGN_BYTES if self.direct else BUFFERED_ALIGN_BYTES

    def read(self, plan: ReadPlan, slot: memoryview, *, urgent: bool = True) -> Ticket:
        """Start filling `slot` as `plan` says; urgent reads go before the others.

        Failures (DiskReadError, CheckpointChangedError) come from wait().
        """
        pieces = []
        for run in plan.runs:
            for begin in range(0, run.num_bytes, PIECE_BYTES):
                pieces.append(partial(self._read_piece, run, begin, slot))
        return self._queue.submit(pieces, urgent=urgent)

    def read_through(self, passages: Sequence[Passage], *, urgent: bool = True) -> Ticket:
        """Start reading `passages`, each in one piece; failures come from wait(), those of `take` too."""
        return self._queue.submit([partial(self._pass_on, passage) for passage in passages], urgent=urgent)

    def _pass_on(self, passage: Passage) -> None:
        begin = passage.start - passage.start % self.align_bytes
        end = passage.start + passage.num_bytes
        padded = end + -end % self.align_bytes
        if not hasattr(self._own, "memory"):
            self._own.memory = mmap.mmap(-1, THROUGH_BYTES)
            self._own.address = ctypes.addressof(ctypes.c_char.from_buffer(self._own.memory))
        self._begin(padded - begin)
        try:
            self._files[passage.file_idx].read_into(
                memoryview(self._own.memory)[: padded - begin], begin, need_bytes=end - begin, direct=self.direct
            )
        finally:
            self._end()
        passage.take(self._own.address + passage.start - begin)

    def _read_piece(self, run: Run, begin: int, slot: memoryview) -> None:
        num_bytes = min(PIECE_BYTES, run.num_bytes - begin)
        offset = run.slot_offset + begin
        self._begin(num_bytes)
        try:
            self._files[run.file_idx].read_into(
                slot[offset : offset + num_bytes],
                run.start + begin,
                need_bytes=max(0, min(num_bytes, run.need_bytes - begin)),
                direct=self.direct,
            )
        finally:
            self._end()

    def _begin(self, num_bytes: int) -> None:
        with self._counting:  # here, and not when it is queued: what is taken back was not read
            self._counters.disk_reads += 1
            self._counters.disk_bytes += num_bytes
            if not self._under_way:
                self._busy_since_ns = time.perf_counter_ns()
            self._under_way += 1

    def _end(self) -> None:
        with self._counting:
            self._under_way -= 1
            if not self._under_way:
                self._counters.disk_busy_ns += time.perf_counter_ns() - self._busy_since_ns

    def restart(self) -> None:
        """End every read, also those whose ticket was lost: afterwards nobody writes to a slot, and reads may start."""
        self._queue.restart()

    def close(self) -> None:
        """End the threads; reads that were queued are dropped, reads under way end first."""
        self._queue.close()
