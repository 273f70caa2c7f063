"""Experts in RAM slots: find, fetch, hold, evict.

Concurrency. One thread (the one that runs the model) calls everything here. Bytes arrive on the disk tier's threads,
into slots that are FILLING; a FILLING slot is nobody's until `finish` has waited for its ticket, and a READY slot is
only read. A slot is reused after eviction, which requires READY and no hold, so no read can be under way in it and no
computation can be using it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from offmoe.base.counters import Counters
from offmoe.base.keys import ExpertKey
from offmoe.cache.policy import Policy
from offmoe.cache.slots import SlotState, SlotTable
from offmoe.checkpoint.expert_index import ExpertIndex, MoeLayer, ReadPlan, plan_read
from offmoe.formats.dense import ExpertWeights, view_expert
from offmoe.tiers.copier import Ticket
from offmoe.tiers.disk import DiskTier
from offmoe.tiers.host import HostPool

LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Fetch:
    """A read under way. It ends in exactly one call of `ExpertCache.finish` or `abandon`."""

    key: ExpertKey
    slot: int
    ticket: Ticket


class ExpertCache:
    """Expert weights in the host pool, read from disk on demand."""

    def __init__(self, index: ExpertIndex, pool: HostPool, disk: DiskTier, policy: Policy, counters: Counters) -> None:
        self._index, self._pool, self._disk, self._policy = index, pool, disk, policy
        self.counters = counters
        self.slots = SlotTable(pool.num_slots)
        self._weights: list[ExpertWeights | None] = [None] * pool.num_slots
        self._plans: dict[ExpertKey, ReadPlan] = {}
        self._keeps_all = pool.num_slots >= index.num_experts

    def __repr__(self) -> str:
        table = repr(self.slots).removeprefix("<SlotTable [").removesuffix("]>")
        return f"<ExpertCache [{table} | {self.counters.hits} hits, {self.counters.misses} misses]>"

    @property
    def num_slots(self) -> int:
        """Experts that fit."""
        return len(self.slots)

    @property
    def slots_per_layer(self) -> int:
        """A layer's fair share of the slots."""
        return self.num_slots // len(self._index.layers)

    def has(self, key: ExpertKey) -> bool:
        """True when `key` is READY."""
        slot = self.slots.find(key)
        return slot is not None and self.slots.state(slot) is SlotState.READY

    def use(self, key: ExpertKey, *, touch: bool) -> ExpertWeights:
        """Hold a READY key and return its weights; `touch` tells the policy. Release it afterwards."""
        slot = self.slots.find(key)
        assert slot is not None, f"{key=} is not cached"
        self.slots.hold(slot)
        if touch:
            self._policy.touched(key)
        weights = self._weights[slot]
        assert weights is not None, f"{key=} {slot=} is not ready"
        return weights

    def release(self, key: ExpertKey) -> None:
        """Undo one `use` or `finish`."""
        slot = self.slots.find(key)
        assert slot is not None, f"{key=} is not cached"
        self.slots.release(slot)

    def start(self, key: ExpertKey, *, cold: bool) -> Fetch | None:
        """Begin reading `key` into a free slot or a victim's; None when every slot is held or filling."""
        if not self.slots.num_free:
            victim = self._policy.victim(self.slots.is_evictable)
            if victim is None:
                return None
            self._policy.removed(victim)
            self._weights[self.slots.evict(victim)] = None
            self.counters.evictions += 1
        slot = self.slots.reserve(key)
        self._policy.inserted(key, cold=cold)
        return Fetch(key, slot, self._disk.read(self._plan(key), self._pool.memory(slot)))

    def finish(self, fetch: Fetch) -> ExpertWeights:
        """Wait for a fetch, hold the key and return its weights. On failure the slot is freed and the error raised."""
        layer = self._index.layers[fetch.key.layer_idx]
        try:
            fetch.ticket.wait()
            weights = view_expert(layer, self._pool.tensor(fetch.slot), self._source_offsets(fetch, layer))
        except BaseException:
            self.abandon([fetch])
            raise
        self.slots.mark_ready(fetch.slot)
        self.slots.hold(fetch.slot)
        self._weights[fetch.slot] = weights
        return weights

    def _source_offsets(self, fetch: Fetch, layer: MoeLayer) -> tuple[int, ...]:
        """Where the expert's sources begin in its slot, after moving it to a cache line's start where that pays.

        Files align tensors to 8 bytes, and torch's 16-bit products read weights 10-14% slower off a 64-byte line
        (8 bytes off: 10.1 against 11.5 GB/s up, 9.3 against 10.3 down). A move costs about a millisecond, so it is made
        only where all experts fit and each is moved once. Float32 stays: its last bits depend on the address.
        """
        plan = self._plan(fetch.key)
        if not self._keeps_all or layer.up[0].dtype not in ("BF16", "F16"):
            return plan.source_offsets
        offsets = list(plan.source_offsets)
        for run in plan.runs:
            end = run.slot_offset + run.need_bytes
            inside = [idx for idx, offset in enumerate(offsets) if run.slot_offset <= offset < end]
            first = min(offsets[idx] for idx in inside)
            shift = first % LINE_BYTES
            if shift:
                self._pool.move(fetch.slot, src=first, dst=first - shift, num_bytes=end - first)
                for idx in inside:
                    offsets[idx] -= shift
        return tuple(offsets)

    def abandon(self, fetches: Iterable[Fetch]) -> None:
        """Free the slots of fetches that nobody will finish, after their reads have ended (they may still write).

        A KeyboardInterrupt meanwhile is raised at the end: a slot left FILLING would be lost for good.
        """
        interrupt: BaseException | None = None
        for fetch in fetches:
            while not fetch.ticket.done():
                try:
                    fetch.ticket.wait()
                except Exception:  # noqa: BLE001 - the cause is being raised by whoever abandons
                    break
                except BaseException as error:  # noqa: BLE001 - raised below
                    interrupt = error
            self._policy.removed(fetch.key)
            self.slots.mark_failed(fetch.slot)
        if interrupt is not None:
            raise interrupt

    def recover(self) -> None:
        """Put the books in order after a call was broken off between any two lines (Ctrl-C). Afterwards nothing is
        held and nothing is under way; what was READY stays, in the order in which the policy would let it go.
        """
        self._disk.restart()
        order: list[ExpertKey] = []
        while (key := self._policy.victim(lambda key: True)) is not None:
            order.append(key)
            self._policy.removed(key)
        kept = set(self.slots.recover(lambda slot: self._weights[slot] is not None))
        for key in [*(key for key in order if key in kept), *sorted(kept - set(order))]:
            self._policy.inserted(key, cold=False)
        for slot in range(len(self.slots)):
            if self.slots.state(slot) is not SlotState.READY:
                self._weights[slot] = None

    def _plan(self, key: ExpertKey) -> ReadPlan:
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_read(self._index.spans(key), align_bytes=self._disk.align_bytes)
        return plan

    def close(self) -> None:
        """Drop every view of the pool. No `use` or `start` afterwards."""
        self._weights = [None] * self.num_slots
