"""A cache that prefetches in virtual time: keys and jobs on a lane, no bytes.

`FakeCache` keeps the contract of `ExpertCache` (cache/expert_cache.py) as far as fetches ahead of time go.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from virtual_machine import CancelledJobError, Job, VirtualMachine

from offmoe.cache.policy import LruPolicy
from offmoe.cache.slots import SlotState, SlotTable
from offmoe.core.counters import Counters
from offmoe.core.keys import ExpertKey
from offmoe.prefetch.controller import PrefetchController

EXPERT_BYTES = 1_000_000


@dataclass
class Coming:
    """A move under way."""

    key: ExpertKey
    slot: int
    job: Job
    ahead: bool
    doomed: bool = False


class FakeCache:
    """Slots, LRU, one link. `log` tells what was moved, in order; `refuse` makes every start ahead fail."""

    def __init__(self, machine: VirtualMachine, *, num_slots: int, num_layers: int) -> None:
        self.machine, self.slots, self.policy = machine, SlotTable(num_slots), LruPolicy()
        self.num_layers = num_layers
        self.counters = Counters()
        self.late = 0
        self.ahead_bytes = 0
        self.most_ahead_bytes = 0
        self.refuse = False
        self.coming: dict[ExpertKey, Coming] = {}
        self.guesses: set[ExpertKey] = set()
        self.log: list[tuple[str, ExpertKey]] = []

    @property
    def slots_per_layer(self) -> int:
        return len(self.slots) // self.num_layers

    def num_bytes(self, key: ExpertKey) -> int:
        return EXPERT_BYTES

    def is_ready(self, key: ExpertKey) -> bool:
        slot = self.slots.find(key)
        return slot is not None and self.slots.state(slot) is SlotState.READY

    def is_coming(self, key: ExpertKey) -> bool:
        return key in self.coming and not self.coming[key].doomed

    def start_ahead(self, key: ExpertKey, *, keep: Collection[ExpertKey]) -> bool:
        assert not self.is_ready(key) and not self.is_coming(key), f"{key} is asked for twice"
        if self.refuse or self.slots.find(key) is not None:
            return False
        if not self._make_room(lambda k: k not in keep and k not in self.guesses and self.slots.is_evictable(k)):
            return False
        self._begin(key, urgent=False, ahead=True, cold=True)
        self.guesses.add(key)
        self.ahead_bytes += EXPERT_BYTES
        self.counters.ahead_bytes += EXPERT_BYTES
        self.most_ahead_bytes = max(self.most_ahead_bytes, self.ahead_bytes)
        return True

    def demand(self, key: ExpertKey, *, cold: bool = False) -> Coming | None:
        """As `ExpertCache.start` does."""
        coming = self.coming.get(key)
        if coming is not None and coming.doomed:
            self.end(coming)
            coming = None
        if coming is not None:
            coming.ahead = False
            coming.job.promote()
            if not cold:
                self.policy.touched(key)
            return coming
        evictable = self.slots.is_evictable
        if self._make_room(lambda k: k not in self.guesses and evictable(k)) or self._make_room(evictable):
            return self._begin(key, urgent=True, ahead=False, cold=cold)
        return None

    def finish(self, coming: Coming) -> None:
        """Wait, and hold."""
        self.late += coming.key in self.guesses and not coming.job.done()
        coming.job.wait()
        self._arrived(coming)
        self.slots.hold(coming.slot)
        self._used(coming.key)

    def use(self, key: ExpertKey, *, touch: bool = True) -> None:
        """Hold a READY key."""
        slot = self.slots.find(key)
        assert slot is not None and self.is_ready(key), f"{key=}"
        self.slots.hold(slot)
        if touch:
            self.policy.touched(key)
        self._used(key)

    def release(self, keys: Sequence[ExpertKey]) -> None:
        for key in keys:
            slot = self.slots.find(key)
            assert slot is not None, f"{key=}"
            self.slots.release(slot)

    def cancel_ahead(self, key: ExpertKey) -> bool:
        coming = self.coming.get(key)
        if coming is None or not coming.ahead or coming.doomed or not coming.job.cancel():
            return False
        self.log.append(("cancel", key))
        coming.doomed = True
        self._wasted(key)
        if coming.job.done():
            self.end(coming)
        return True

    def expire_ahead(self, layer_idx: int, needed: Collection[ExpertKey]) -> None:
        for key in [key for key in self.guesses if key.layer_idx == layer_idx and key not in needed]:
            self.cancel_ahead(key)
            self._wasted(key)

    def poll(self) -> None:
        for coming in [coming for coming in self.coming.values() if coming.ahead and coming.job.done()]:
            self.end(coming)

    def end(self, coming: Coming) -> None:
        """A move ahead of time ends: READY, or free again when it was taken back."""
        try:
            coming.job.wait()
        except CancelledJobError:
            del self.coming[coming.key]
            self.policy.removed(coming.key)
            self.slots.mark_failed(coming.slot)
        else:
            self._arrived(coming)

    def recover(self) -> None:
        """Recover as after Ctrl-C: nothing is held, nothing under way, and what was not used is wasted."""
        self.machine.drain()
        for coming in self.coming.values():
            self.policy.removed(coming.key)
        self.coming.clear()
        self.counters.ahead_wasted_bytes += len(self.guesses) * EXPERT_BYTES
        self.guesses.clear()
        self.ahead_bytes = 0
        self.slots.recover(lambda slot: True)

    def _make_room(self, may_go: Callable[[ExpertKey], bool]) -> bool:
        if self.slots.num_free:
            return True
        victim = self.policy.victim(may_go)
        if victim is None:
            return False
        self.log.append(("evict", victim))
        self.policy.removed(victim)
        self.slots.evict(victim)
        self._wasted(victim)
        return True

    def _begin(self, key: ExpertKey, *, urgent: bool, ahead: bool, cold: bool) -> Coming:
        self.log.append(("ahead" if ahead else "demand", key))
        job = self.machine.link.submit(EXPERT_BYTES, urgent=urgent)
        coming = self.coming[key] = Coming(key, self.slots.reserve(key), job, ahead)
        self.policy.inserted(key, cold=cold)
        return coming

    def _arrived(self, coming: Coming) -> None:
        del self.coming[coming.key]
        self.slots.mark_ready(coming.slot)
        if coming.key in self.guesses:
            self.ahead_bytes -= EXPERT_BYTES

    def _used(self, key: ExpertKey) -> None:
        if key in self.guesses:
            self.guesses.discard(key)
            self.counters.ahead_used_bytes += EXPERT_BYTES

    def _wasted(self, key: ExpertKey) -> None:
        if key in self.guesses:
            self.guesses.discard(key)
            if key in self.coming:
                self.ahead_bytes -= EXPERT_BYTES
            self.counters.ahead_wasted_bytes += EXPERT_BYTES


def check_ledger(controller: PrefetchController, budget_bytes: int | None) -> None:
    """Assert the invariants of a cache's ledger, where a controller alone fetches ahead.

    `budget_bytes` is None where whole layers are wanted, which have another bound.
    """
    cache, counters = controller.cache, controller.cache.counters
    pending_bytes = sum(cache.num_bytes(key) for key in cache.guesses)
    assert counters.ahead_bytes == counters.ahead_used_bytes + counters.ahead_wasted_bytes + pending_bytes
    assert budget_bytes is None or cache.ahead_bytes <= budget_bytes, f"{controller!r} {budget_bytes=}"
    assert controller.num_pending == len(cache.guesses)


def fates(controller: PrefetchController) -> tuple[int, int]:
    """Experts that were fetched ahead and used, and that were for nothing."""
    counters = controller.cache.counters
    return counters.ahead_used_bytes // EXPERT_BYTES, counters.ahead_wasted_bytes // EXPERT_BYTES
