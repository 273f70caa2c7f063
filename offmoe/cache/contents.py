"""The slots of one tier, the weights in them, and the policy that says which of them go. Nothing is under way here."""

from __future__ import annotations

from collections.abc import Callable

from offmoe.cache.policy import Policy, hand_over
from offmoe.cache.slots import SlotState, SlotTable
from offmoe.core.keys import ExpertKey
from offmoe.formats.dense import ExpertWeights


class Contents:
    """Slots and the experts in them. `policy` knows every key that has a slot, READY or FILLING.

    `changes`: the keys whose weights came or went since `take_changes`; no more than there are keys, if nobody asks.
    """

    def __init__(self, num_slots: int, policy: Policy) -> None:
        self.slots, self.policy = SlotTable(num_slots), policy
        self.weights: list[ExpertWeights | None] = [None] * num_slots
        self.changes: set[ExpertKey] = set()

    def find(self, key: ExpertKey) -> ExpertWeights | None:
        """The weights of a READY key."""
        slot = self.slots.find(key)
        return None if slot is None else self.weights[slot]

    def take_changes(self) -> set[ExpertKey]:
        """`changes`, which begins anew."""
        taken, self.changes = self.changes, set()
        return taken

    def fill(self, key: ExpertKey, slot: int, weights: ExpertWeights) -> None:
        """The bytes of `key` have arrived in its slot."""
        self.weights[slot] = weights
        self.changes.add(key)

    def slot_of(self, key: ExpertKey) -> int:
        """The slot of a key that has one."""
        slot = self.slots.find(key)
        assert slot is not None, f"{key=} is not cached"
        return slot

    def is_ready(self, key: ExpertKey) -> bool:
        """True when `key` can be used at once."""
        slot = self.slots.find(key)
        return slot is not None and self.slots.state(slot) is SlotState.READY

    def victim(self, layer_idx: int, *refused: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The victim for an expert of `layer_idx`: READY, not held, and nobody that one of `refused` names."""
        is_evictable = self.slots.is_evictable
        if not refused:
            return self.policy.victim(is_evictable, layer_idx)
        return self.policy.victim(lambda key: not any(no(key) for no in refused) and is_evictable(key), layer_idx)

    def evict(self, key: ExpertKey) -> None:
        """A READY key that is not held goes; its slot is free."""
        self.policy.removed(key)
        self.weights[self.slots.evict(key)] = None
        self.changes.add(key)

    def take_next(self, slot: int) -> tuple[ExpertKey | None, bool]:
        """Make the slot behind `slot` a part of it: the key that went for it, and whether it was to be had."""
        behind, victim = slot + 1, None
        if behind >= len(self.slots):
            return None, False
        key = self.slots.key_of(behind)
        if key is not None and self.slots.is_evictable(key):
            victim = key
            self.evict(key)
        if self.slots.state(behind) is not SlotState.FREE:
            return victim, False
        self.slots.take_next(slot)
        return victim, True

    def fail(self, key: ExpertKey, slot: int) -> None:
        """Free `slot`: its fetch failed."""
        self.policy.removed(key)
        self.slots.mark_failed(slot)

    def recover(self) -> None:
        """After a call was broken off between any two lines: what is READY stays, in the policy's order; all else goes.
        Nobody may be writing to a slot any more.
        """
        self.changes.update(self.slots.keys())
        hand_over(self.policy, self.policy, set(self.slots.recover(lambda slot: self.weights[slot] is not None)))
        for slot in range(len(self.slots)):
            if self.slots.state(slot) is not SlotState.READY:
                self.weights[slot] = None

    def clear(self) -> None:
        """Drop every view of the slots."""
        self.changes.update(self.slots.keys())
        self.weights = [None] * len(self.weights)
