"""The host tier: one slab of RAM cut into equal slots."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch

from offmoe.core.errors import BudgetError
from offmoe.core.units import format_bytes


class HostPool:
    """`num_slots` slots of `slot_bytes` each, allocated once, page-aligned (direct reads need that).

    The slab is an anonymous mapping: pages count as used only once written, and all of it goes back to the system
    when the last view dies after `close()`, which malloc does not promise.
    """

    def __init__(self, *, num_slots: int, slot_bytes: int) -> None:
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        try:
            slab = _map_private(num_slots * slot_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise BudgetError(
                f"the system refused {format_bytes(num_slots * slot_bytes)} for {num_slots} expert slots ({error}); "
                "lower --ram"
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: slower look-ups, nothing else
                slab.madvise(mmap.MADV_HUGEPAGE)
        self._view: memoryview | None = memoryview(slab)
        self._bytes: torch.Tensor | None = torch.frombuffer(slab, dtype=torch.uint8)

    def __repr__(self) -> str:
        return f"<HostPool [{self.num_slots} slots of {format_bytes(self.slot_bytes)}]>"

    @property
    def slab(self) -> torch.Tensor:
        """All slots, one after the other, as uint8."""
        assert self._bytes is not None, "the pool is closed"
        return self._bytes

    def memory(self, slot: int) -> memoryview:
        """The slot's bytes, writable."""
        assert self._view is not None, "the pool is closed"
        return self._view[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def tensor(self, slot: int) -> torch.Tensor:
        """The slot's bytes as a uint8 tensor that shares their memory."""
        return self.slab.narrow(0, slot * self.slot_bytes, self.slot_bytes)

    def move(self, slot: int, *, src: int, dst: int, num_bytes: int) -> None:
        """Move bytes within a slot; the ranges may overlap."""
        assert dst >= 0 and max(src, dst) + num_bytes <= self.slot_bytes, f"{src=} {dst=} {num_bytes=}"
        begin = self.slab.data_ptr() + slot * self.slot_bytes
        ctypes.memmove(begin + dst, begin + src, num_bytes)

    def close(self) -> None:
        """Let go of the slab; it is freed when no tensor refers to it."""
        self._view = None
        self._bytes = None


def _map_private(num_bytes: int) -> mmap.mmap:
    """An anonymous mapping. Python's default is a shared one, which never gets huge pages."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, num_bytes)
