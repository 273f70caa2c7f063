"""The copier on a real device: bytes, order against computations, reuse of slots, pinning, memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from offmoe.core.errors import BudgetError, DeviceError
from offmoe.tiers.copier import CancelledMoveError, Ticket
from offmoe.tiers.cuda import CudaDevice
from offmoe.tiers.device import DevicePool
from offmoe.tiers.host import HostPool
from offmoe.tiers.open_device import open_device

NUM_SLOTS = 12
SLOT_BYTES = 5 << 20
GPU = torch.device("cuda", 0)


class Rig:
    """Host slots filled with known bytes, and device slots."""

    def __init__(self, *, pinned: bool) -> None:
        self.device = CudaDevice(0)
        self.host = HostPool(num_slots=NUM_SLOTS, slot_bytes=SLOT_BYTES)
        self.pool: DevicePool = self.device.make_pool(NUM_SLOTS, SLOT_BYTES)
        generator = torch.Generator().manual_seed(0)
        self.host.slab.random_(0, 256, generator=generator)
        if pinned:
            reason = self.device.pin(self.host.slab)
            if reason is not None:
                pytest.skip(f"the system refuses to pin memory: {reason}")

    def copy(self, src: int, dst: int, *, urgent: bool, after: object = None) -> Ticket:
        """Slot to slot, in three parts that are no multiples of anything."""
        cuts = (0, 1_000_003, 1_000_010, SLOT_BYTES)
        host, device = self.host.tensor(src), self.pool.tensor(dst)
        parts = [(host[begin:end], device[begin:end]) for begin, end in zip(cuts, cuts[1:], strict=False)]
        return self.device.copier.copy(parts, urgent=urgent, after=after)

    def holds(self, dst: int, src: int) -> bool:
        return torch.equal(self.pool.tensor(dst)[:SLOT_BYTES].cpu(), self.host.tensor(src))

    def close(self) -> None:
        self.device.close()
        self.pool.close()
        self.host.close()


@pytest.fixture(params=["pinned", "staged"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(pinned=request.param == "pinned")
    yield made
    made.close()


def be_busy(milliseconds: int = 50) -> None:
    """Keep the current stream busy."""
    torch.cuda._sleep(milliseconds * 1_500_000)


@pytest.mark.parametrize("urgent", [True, False])
def test_bytes_arrive(rig: Rig, urgent: bool) -> None:
    tickets = [rig.copy(slot, slot, urgent=urgent) for slot in range(NUM_SLOTS)]
    for slot, ticket in enumerate(tickets):
        ticket.wait()
        assert rig.holds(slot, slot)
        assert ticket.done()


@pytest.mark.parametrize("urgent", [True, False])
def test_what_is_computed_after_the_wait_sees_the_bytes(rig: Rig, urgent: bool) -> None:
    """On a stream other than the default one, without the host waiting for the copy."""
    sums = [int(rig.host.tensor(slot).sum(dtype=torch.int64)) for slot in range(NUM_SLOTS)]
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(5):
            rig.pool.slab.zero_()
            after = rig.device.copier.mark()
            seen = []
            for slot in range(NUM_SLOTS):
                rig.copy(slot, slot, urgent=urgent, after=after).wait()
                seen.append(rig.pool.tensor(slot)[:SLOT_BYTES].sum(dtype=torch.int64))
            assert torch.stack(seen).tolist() == sums


@pytest.mark.parametrize("urgent", [True, False])
def test_a_slot_is_not_overwritten_before_the_mark(rig: Rig, urgent: bool) -> None:
    rig.copy(0, 0, urgent=True).wait()
    be_busy()
    seen = rig.pool.tensor(0)[:SLOT_BYTES].clone()
    after = rig.device.copier.mark()
    ticket = rig.copy(1, 0, urgent=urgent, after=after)
    ticket.wait()
    assert torch.equal(seen.cpu(), rig.host.tensor(0))
    assert rig.holds(0, 1)


def test_waiting_does_not_wait_for_the_computations(rig: Rig) -> None:
    be_busy(500)
    busy = torch.cuda.Event()
    busy.record()
    for slot in range(NUM_SLOTS):
        rig.copy(slot, slot, urgent=True).wait()
    assert not busy.query()
    assert rig.holds(3, 3)


def test_random_use_as_a_cache_would(rig: Rig) -> None:
    """Slots are filled, computed with, and given away again; some copies are taken back or hurried."""
    chooser = random.Random(1)
    marks: list[object] = [None] * NUM_SLOTS
    expected: list[tuple[torch.Tensor, int]] = []
    sums = [int(rig.host.tensor(slot).sum(dtype=torch.int64)) for slot in range(NUM_SLOTS)]
    for _ in range(30):
        slots = chooser.sample(range(NUM_SLOTS), 6)
        moves = []
        for dst in slots:
            src = chooser.randrange(NUM_SLOTS)
            moves.append((src, dst, rig.copy(src, dst, urgent=chooser.random() < 0.3, after=marks[dst])))
        for src, dst, ticket in moves:
            chance = chooser.random()
            if chance < 0.3 and ticket.cancel():
                with pytest.raises(CancelledMoveError):
                    ticket.wait()
                assert ticket.done()
                continue
            if chance < 0.6:
                ticket.promote()
            ticket.wait()
            expected.append((rig.pool.tensor(dst)[:SLOT_BYTES].sum(dtype=torch.int64), sums[src]))
            marks[dst] = rig.device.copier.mark()
    assert [int(seen) for seen, _ in expected] == [want for _, want in expected]


def test_after_a_restart_nobody_writes(rig: Rig) -> None:
    for slot in range(NUM_SLOTS):
        rig.copy(slot, slot, urgent=slot % 2 == 0)
    rig.device.copier.restart()
    rig.pool.slab.zero_()
    torch.cuda.synchronize()
    assert not rig.pool.slab.any()
    rig.copy(4, 5, urgent=False).wait()
    assert rig.holds(5, 4)


def test_what_was_started_is_finished_by_close(rig: Rig) -> None:
    tickets = [rig.copy(slot, slot, urgent=False) for slot in range(NUM_SLOTS)]
    rig.device.copier.close()
    assert all(ticket.done() for ticket in tickets)
    assert all(rig.holds(slot, slot) for slot in range(NUM_SLOTS))


def test_pinned_memory_is_known_to_torch_until_it_is_given_back() -> None:
    rig = Rig(pinned=True)
    assert rig.host.tensor(3).is_pinned()
    rig.device.unpin()
    assert not rig.host.tensor(3).is_pinned()
    rig.copy(1, 1, urgent=True).wait()
    assert rig.holds(1, 1)
    rig.close()


def test_a_refused_pin_leaves_no_error_behind() -> None:
    """Pinning the same memory twice is refused."""
    rig = Rig(pinned=True)
    assert rig.device.pin(rig.host.slab)
    assert torch.ones(3, device=GPU).sum().item() == 3
    rig.copy(1, 1, urgent=True).wait()
    assert rig.holds(1, 1)
    rig.close()


def test_a_pool_larger_than_the_device() -> None:
    device = CudaDevice(0)
    slot_bytes = device.total_bytes() // 16
    with pytest.raises(BudgetError):
        device.make_pool(20, slot_bytes)
    pool = device.make_pool(20, slot_bytes, min_slots=1)
    assert 1 <= pool.num_slots < 17 and pool.wanted_slots == 20
    assert device.free_bytes() < device.total_bytes() - pool.num_bytes + slot_bytes
    pool.close()
    device.close()


def test_devices_by_name() -> None:
    with pytest.raises(DeviceError, match="there is no cuda:99 here; known: cuda:0"):
        open_device("cuda:99")
    for name in ("auto", "cuda", "cuda:0"):
        device = open_device(name)
        assert device is not None and device.torch_device == GPU
        device.close()
