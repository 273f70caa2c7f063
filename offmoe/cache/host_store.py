"""RAM slots as the source of device slots: an expert is copied over the link, and first read from disk if need be.

Ordering. A copy into a device slot waits for the mark that `used` recorded when the slot's last computation had been
submitted, so a queued kernel never sees its weights replaced. The RAM slot that a copy reads from is held until the
copy has ended on the link, which on a device is later than the moment from which kernels may be queued behind it.
Everything is driven by the thread that runs the model: an expert that comes from disk goes on to the device when this
thread next looks (`poll`, `done`, `wait`), not by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import torch

from offmoe.cache.backing_store import DiskStore
from offmoe.cache.expert_cache import ExpertCache
from offmoe.cache.fetch import Fetch
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.core.counters import Counters
from offmoe.core.keys import ExpertKey
from offmoe.formats.dense import ExpertWeights, view_expert
from offmoe.formats.layout import LayerLayout
from offmoe.tiers.copier import CancelledMoveError, Copier, CopyPart, Ticket
from offmoe.tiers.device import DevicePool

# Between two looks at a copy that is queued on the device.
POLL_S = 1e-4


class HostStore:
    """Copies experts from the slots of `host` into those of a device pool."""

    def __init__(
        self, index: ExpertIndex, layouts: Sequence[LayerLayout], host: ExpertCache, host_source: DiskStore,
        pool: DevicePool, copier: Copier, counters: Counters,
    ) -> None:  # fmt: skip
        self._index, self._layouts = index, layouts
        self.host, self._host_source = host, host_source
        self._pool, self._copier, self._counters = pool, copier, counters
        self._last_use: list[object | None] = [None] * pool.num_slots
        self._moves: list[_Move] = []

    def start(self, key: ExpertKey, slot: int, *, urgent: bool) -> Ticket | None:
        """Copy at once when RAM has the expert, else read it first; None when RAM has no slot to read it into."""
        self.poll()
        fetch: Fetch | None = None
        if self.host.is_ready(key):
            self._host_hit()
            self.host.use(key, touch=True)
        else:
            late = self.host.is_coming(key)
            fetch = self.host.start(key, cold=False, urgent=urgent)
            if fetch is None:
                return None
            self._host_miss(late=late)
        move = _Move(self, key, slot, fetch, urgent=urgent)
        self._moves.append(move)
        move.advance()
        return move

    def _host_hit(self) -> None:
        self.host.counters.hits += 1
        self._counters.ram_hits += 1

    def _host_miss(self, *, late: bool) -> None:
        if late:
            self.host.counters.late_hits += 1
        else:
            self.host.counters.misses += 1
            self._counters.ram_misses += 1

    def waited_for_disk(self, wait_ns: int) -> None:
        """A copy could not begin: RAM did not have the expert yet. For `_Move`."""
        self._counters.disk_stall_ns += wait_ns

    def copy(self, key: ExpertKey, slot: int, *, urgent: bool) -> Ticket:
        """Start the copy of an expert that is READY and held in RAM. For `_Move`."""
        self._counters.link_copies += 1
        self._counters.link_bytes += self.num_bytes(key)
        return self._copier.copy(self.parts(key, slot), urgent=urgent, after=self._last_use[slot])

    def parts(self, key: ExpertKey, slot: int) -> list[CopyPart]:
        """Pairs of source and target to copy, for an expert that is READY and held in RAM."""
        offsets = self._layouts[key.layer_idx].offsets
        memory = self._pool.tensor(slot)
        sources = self._host_source.sources(key, self.host.slot_of(key))
        return [
            (source, memory.narrow(0, begin, source.numel())) for begin, source in zip(offsets, sources, strict=True)
        ]

    def synchronize(self) -> None:
        """Wait until the device has done what was submitted."""
        if self._pool.slab.device.type == "cuda":
            torch.cuda.synchronize(self._pool.slab.device)

    def contents(self, key: ExpertKey, slot: int) -> ExpertWeights:
        """Views of the device's memory.

        Called after the ticket's wait: the mark made here comes after the copy, also where nobody ever uses it.
        """
        self._last_use[slot] = self._copier.mark()
        layout = self._layouts[key.layer_idx]
        return view_expert(self._index.layers[key.layer_idx], self._pool.tensor(slot), layout.offsets)

    def num_bytes(self, key: ExpertKey) -> int:
        """Bytes of the expert alone."""
        return self._index.layers[key.layer_idx].expert_bytes

    def used(self, slots: Sequence[int]) -> None:
        """One mark for all of them."""
        if slots:
            mark = self._copier.mark()
            for slot in slots:
                self._last_use[slot] = mark

    def poll(self) -> None:
        """Let what has been read go on to the device, and let RAM slots go whose copy has ended."""
        self.host.poll()
        self._moves = [move for move in self._moves if not move.over()]

    def settle(self) -> None:
        """Wait until RAM holds nothing for a copy, and nothing that it fetched ahead is under way."""
        for move in self._moves:
            move.settle()
        self.poll()
        self.host.settle()

    def restart(self) -> None:
        """End every copy and every read."""
        self._copier.restart()
        self._moves = []
        self.host.recover()


class _Move:
    """Disk -> RAM (unless it is there) -> device. The RAM slot is held from its arrival to the end of the copy."""

    def __init__(self, source: HostStore, key: ExpertKey, slot: int, fetch: Fetch | None, *, urgent: bool) -> None:
        self._source, self._key, self._slot, self._urgent = source, key, slot, urgent
        self._fetch = fetch
        self._copy: Ticket | None = None
        self._error: Exception | None = None

    def advance(self) -> None:
        """Start the copy if the expert is in RAM by now."""
        if self._copy is None and self._error is None and (self._fetch is None or self._fetch.ticket.done()):
            self._start_copy()

    def _start_copy(self) -> None:
        try:
            if self._fetch is not None:
                self._source.host.finish(self._fetch)
            self._copy = self._source.copy(self._key, self._slot, urgent=self._urgent)
        except Exception as error:  # noqa: BLE001 - raised by wait()
            self._error = error

    def done(self) -> bool:
        """True when the bytes are on the device, or the move failed or was taken back."""
        self.advance()
        return self._error is not None or (self._copy is not None and self._copy.done())

    def wait(self) -> None:
        """See Ticket.wait; blocks for the disk, then for the link as its copier says."""
        if self._copy is None and self._error is None:
            begin = time.perf_counter_ns()
            self._start_copy()
            self._source.waited_for_disk(time.perf_counter_ns() - begin)
        if self._error is not None:
            raise self._error
        assert self._copy is not None, f"{self._key=}"
        self._copy.wait()

    def cancel(self) -> bool:
        """Before the copy: a read goes on, into RAM, and nobody waits for it."""
        if self._error is not None:
            return False
        if self._copy is not None:
            return self._copy.cancel()
        assert self._fetch is not None, f"{self._key=}"
        self._fetch.ahead = True
        self._error = CancelledMoveError(f"{self._key} was taken back")
        return True

    def promote(self) -> None:
        """Overtake what is not urgent, on disk and on the link."""
        self._urgent = True
        if self._copy is not None:
            self._copy.promote()
        elif self._fetch is not None:
            self._fetch.ticket.promote()

    def over(self) -> bool:
        """True when nothing is left to do for this move; lets the RAM slot go."""
        self.advance()
        if self._copy is None:
            return self._error is not None
        if not self._copy.done():
            return False
        self._source.host.release([self._key])
        return True

    def settle(self) -> None:
        """Wait until the link no longer reads or writes for this move, whatever becomes of it."""
        with contextlib.suppress(Exception):  # raised again for whoever waits for the expert
            self.wait()
        while self._copy is not None and not self._copy.done():
            time.sleep(POLL_S)
