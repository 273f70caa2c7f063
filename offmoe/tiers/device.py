"""The device tier: a device, and one slab of its memory cut into equal slots.

`SimulatedDevice` is host memory behind a link of a set speed, so everything above it runs without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from offmoe.core.errors import BudgetError
from offmoe.core.units import GIB, format_bytes
from offmoe.tiers.copier import Copier
from offmoe.tiers.throttled import ThrottledCopier

SLOT_ALIGN_BYTES = 256
# Of the slots wanted, given up at each step when the device has no room for them.
SHRINK_SHARE = 32


def round_slot(slot_bytes: int) -> int:
    """Bytes from one slot to the next: kernels may rely on slots that begin at a multiple of 256."""
    return -(-slot_bytes // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES


class DevicePool:
    """Slots of `slot_bytes` each, rounded up to a multiple of 256, in one allocation of the device.

    Where the device has no room for `wanted_slots`, `num_slots` are as many as it has room for.
    """

    def __init__(
        self, torch_device: torch.device, *, num_slots: int, slot_bytes: int, min_slots: int | None = None,
        allocate: Callable[[int], torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """`allocate`: makes the slab, raises torch.OutOfMemoryError. Raises BudgetError below `min_slots` (all)."""
        self.slot_bytes = round_slot(slot_bytes)
        self.wanted_slots = num_slots
        min_slots = num_slots if min_slots is None else min(min_slots, num_slots)
        make = allocate or (lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8, device=torch_device))
        slab, got = None, num_slots
        while slab is None:
            try:
                with torch.inference_mode(False):  # else only inference mode could write to it
                    slab = make(got * self.slot_bytes)
            except torch.OutOfMemoryError:
                if got <= min_slots:
                    raise BudgetError(
                        f"{torch_device} refused {format_bytes(got * self.slot_bytes)} for {got} expert slots of "
                        f"{format_bytes(self.slot_bytes)}, the fewest that work; end other programs that use the "
                        "device, or lower --context-length"
                    ) from None
                got = max(min_slots, got - max(1, num_slots // SHRINK_SHARE))
        self.num_slots = got
        self._slab: torch.Tensor | None = slab

    def __repr__(self) -> str:
        wanted = "" if self.num_slots == self.wanted_slots else f" (wanted {self.wanted_slots})"
        return f"<DevicePool [{self.num_slots} slots{wanted} of {format_bytes(self.slot_bytes)}]>"

    @property
    def slab(self) -> torch.Tensor:
        """All slots, one after the other, as uint8; slot s begins at s * slot_bytes."""
        assert self._slab is not None, "the pool is closed"
        return self._slab

    @property
    def num_bytes(self) -> int:
        """Size of the slab; 0 when closed."""
        return 0 if self._slab is None else self._slab.nbytes

    def tensor(self, slot: int) -> torch.Tensor:
        """The slot's bytes as a uint8 tensor that shares their memory."""
        return self.slab.narrow(0, slot * self.slot_bytes, self.slot_bytes)

    def close(self) -> None:
        """Let go of the slab; it is freed when no tensor refers to it. Copies into it must have ended."""
        self._slab = None


class Moment(Protocol):
    """A point on a device's stream."""

    def ns_since(self, earlier: Any) -> int | None:
        """Nanoseconds from `earlier` (of the same kind) to this; None while it has not been passed. Never blocks."""


class Device(Protocol):
    """The device that has the resident weights and the expert slots, and the link to it."""

    torch_device: torch.device
    name: str
    copier: Copier

    def make_pool(self, num_slots: int, slot_bytes: int, *, min_slots: int | None = None) -> DevicePool:
        """A pool with as many of `num_slots` as there is room for; BudgetError below `min_slots` (default: all)."""

    def pin(self, slab: torch.Tensor, progress: Callable[[int, int], None] = lambda done, total: None) -> str | None:
        """Page-lock host memory, so that copies from it need no staging; the reason where that is refused.

        The slab must live until `unpin()` or `close()`. `progress(done_bytes, total_bytes)`: pages taken for it.
        """

    def unpin(self) -> None:
        """Undo every `pin`, once what was copied from there has ended."""

    def follow_stream(self) -> None:
        """Order what the calling thread queues from now on behind what it queued before on another stream. What is in
        a slot was waited for on the stream of that time, and the marks of later reads are to cover earlier ones.
        """

    def moment(self) -> Moment | None:
        """The point that its stream has reached in what the calling thread has queued; None where nothing is queued,
        since a copy and a computation have ended when the host has waited for them.
        """

    def free_bytes(self) -> int:
        """Bytes that could be allocated now, by its driver's word."""

    def driver_bytes(self) -> int:
        """Bytes that its driver has taken for this process beside torch's: context, kernels, graphs."""

    def total_bytes(self) -> int:
        """Bytes that it has."""

    def close(self) -> None:
        """End its copies, then release streams, threads and pinned memory. Before the pools are closed."""


class SimulatedDevice:
    """Host memory behind a link of `bytes_per_s`. Tests may change `taken_bytes`, what others use of it, and
    `context_bytes`, what its driver has taken for this process.
    """

    def __init__(
        self, bytes_per_s: float, latency_s: float = 0.0, capacity_bytes: int = 8 * GIB, *,
        copier: Copier | None = None,
    ) -> None:  # fmt: skip
        """`copier`: instead of the throttled one."""
        self.torch_device = torch.device("cpu")
        self.name = "simulated"
        self.copier: Copier = copier or ThrottledCopier(bytes_per_s=bytes_per_s, latency_s=latency_s)
        self.taken_bytes = self.context_bytes = 0
        self._capacity_bytes = capacity_bytes
        self._pools: list[DevicePool] = []

    def __repr__(self) -> str:
        return f"<SimulatedDevice [{format_bytes(self.free_bytes())} of {format_bytes(self._capacity_bytes)} free]>"

    def make_pool(self, num_slots: int, slot_bytes: int, *, min_slots: int | None = None) -> DevicePool:
        """See `Device`."""
        pool = DevicePool(
            self.torch_device, num_slots=num_slots, slot_bytes=slot_bytes, min_slots=min_slots, allocate=self._allocate
        )
        self._pools.append(pool)
        return pool

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        if num_bytes > self.free_bytes():
            raise torch.OutOfMemoryError(f"{num_bytes} bytes of {self.free_bytes()}")
        memory = torch.empty(num_bytes + SLOT_ALIGN_BYTES, dtype=torch.uint8)
        return memory.narrow(0, -memory.data_ptr() % SLOT_ALIGN_BYTES, num_bytes)

    def pin(self, slab: torch.Tensor, progress: Callable[[int, int], None] = lambda done, total: None) -> str | None:
        """Nothing to do."""
        return None

    def unpin(self) -> None:
        """Nothing to undo."""

    def follow_stream(self) -> None:
        """There are no streams."""

    def moment(self) -> None:
        """The host waits."""

    def free_bytes(self) -> int:
        """Bytes that neither pools nor the driver nor others use."""
        taken = self.taken_bytes + self.context_bytes
        return max(0, self._capacity_bytes - taken - sum(pool.num_bytes for pool in self._pools))

    def driver_bytes(self) -> int:
        """Return what was set."""
        return self.context_bytes

    def total_bytes(self) -> int:
        """Bytes that it was made with."""
        return self._capacity_bytes

    def close(self) -> None:
        """Carry what is queued and end the link's thread."""
        self.copier.close()
