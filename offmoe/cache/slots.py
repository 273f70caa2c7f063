"""Which expert lies in which slot. Plain Python: no bytes, no torch, no threads of its own.

A slot is FREE, FILLING (reserved for a key, bytes on their way) or READY (bytes valid). A held slot cannot be
evicted. Weights are read-only, so eviction only forgets. Only the thread that runs the model may call this.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from offmoe.core.keys import ExpertKey


class SlotState(Enum):
    """The life of a slot: FREE -> FILLING -> READY -> FREE, or FILLING -> FREE when the read fails.

    PART: it belongs to the slot before it, which holds an expert that is larger than a slot.
    """

    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    PART = "part"


class SlotTable:
    """A map key -> slot, and each slot's state and holds."""

    def __init__(self, num_slots: int) -> None:
        assert num_slots > 0, f"{num_slots=}"
        self._states = [SlotState.FREE] * num_slots
        self._keys: list[ExpertKey | None] = [None] * num_slots
        self._holds = [0] * num_slots
        self._slot_of: dict[ExpertKey, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._states)

    def __repr__(self) -> str:
        counts = {state: self._states.count(state) for state in SlotState}
        held = sum(1 for holds in self._holds if holds)
        return (
            f"<SlotTable [slots: {counts[SlotState.READY]} ready, {counts[SlotState.FILLING]} filling, "
            f"{counts[SlotState.FREE]} free | {held} held]>"
        )

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def find(self, key: ExpertKey) -> int | None:
        """The slot of `key`, FILLING or READY; None when it has none."""
        return self._slot_of.get(key)

    def keys(self) -> set[ExpertKey]:
        """Those that have a slot, by the map or by the slot, should a call have been broken off between the two."""
        return {*self._slot_of, *(key for key in self._keys if key is not None)}

    def state(self, slot: int) -> SlotState:
        """The slot's state."""
        return self._states[slot]

    def is_evictable(self, key: ExpertKey) -> bool:
        """True when `key` is READY and not held."""
        slot = self._slot_of.get(key)
        return slot is not None and self._states[slot] is SlotState.READY and self._holds[slot] == 0

    def reserve(self, key: ExpertKey) -> int:
        """Give `key` a free slot: FREE -> FILLING. The caller evicts first when none is free."""
        assert key not in self._slot_of, f"{key=} already has slot {self._slot_of[key]}"
        slot = self._free.pop()
        self._states[slot], self._keys[slot] = SlotState.FILLING, key
        self._slot_of[key] = slot
        return slot

    def mark_ready(self, slot: int) -> None:
        """The bytes have arrived: FILLING -> READY."""
        assert self._states[slot] is SlotState.FILLING, f"{slot=} {self._states[slot]=}"
        self._states[slot] = SlotState.READY

    def mark_failed(self, slot: int) -> None:
        """The read failed and nobody writes to the slot any more: FILLING -> FREE."""
        assert self._states[slot] is SlotState.FILLING, f"{slot=} {self._states[slot]=}"
        self._forget(slot)

    def evict(self, key: ExpertKey) -> int:
        """Forget a key that is READY and not held; its slot becomes FREE and is returned."""
        slot = self._slot_of[key]
        assert self.is_evictable(key), f"{key=} {self._states[slot]=} {self._holds[slot]=}"
        self._forget(slot)
        return slot

    def take_next(self, slot: int) -> None:
        """The free slot behind `slot` is a part of it, until its key goes."""
        assert self._states[slot] is not SlotState.FREE and self._states[slot + 1] is SlotState.FREE, f"{slot=}"
        self._free.remove(slot + 1)
        self._states[slot + 1] = SlotState.PART

    def key_of(self, slot: int) -> ExpertKey | None:
        """The key that a slot holds or waits for."""
        return self._keys[slot]

    def hold(self, slot: int) -> None:
        """Keep the slot from eviction until as many releases."""
        assert self._states[slot] is not SlotState.FREE, f"{slot=} is free"
        self._holds[slot] += 1

    def release(self, slot: int) -> None:
        """Undo one hold."""
        assert self._holds[slot] > 0, f"{slot=} is not held"
        self._holds[slot] -= 1

    def _forget(self, slot: int) -> None:
        key = self._keys[slot]
        assert key is not None and self._holds[slot] == 0, f"{slot=} {key=} {self._holds[slot]=}"
        del self._slot_of[key]
        self._states[slot], self._keys[slot] = SlotState.FREE, None
        self._free.append(slot)
        if self._is_part(slot + 1):
            self._states[slot + 1] = SlotState.FREE
            self._free.append(slot + 1)

    def _is_part(self, slot: int) -> bool:
        return slot < len(self._states) and self._states[slot] is SlotState.PART

    def recover(self, is_valid: Callable[[int], bool]) -> list[ExpertKey]:
        """After a call was broken off between any two lines: forget holds and reads, keep the READY slots that the map
        and `is_valid(slot)` agree on, and return their keys. Nobody may be writing to a slot any more.
        """
        kept = {
            key: slot
            for slot, (state, key) in enumerate(zip(self._states, self._keys, strict=True))
            if state is SlotState.READY and key is not None and self._slot_of.get(key) == slot and is_valid(slot)
        }
        slots = set(kept.values())
        slots |= {slot + 1 for slot in slots if self._is_part(slot + 1)}
        self._holds = [0] * len(self._states)
        self._free = [slot for slot in range(len(self._states) - 1, -1, -1) if slot not in slots]
        for slot in self._free:
            self._states[slot], self._keys[slot] = SlotState.FREE, None
        self._slot_of = kept
        return list(kept)

    def check_integrity(self) -> None:
        """Assert that map, states, keys, holds and free list agree. For tests, after every step."""
        assert len(set(self._free)) == len(self._free), f"{self._free=}"
        parts = self._states.count(SlotState.PART)
        assert len(self._slot_of) + len(self._free) + parts == len(self._states), f"{self!r}"
        for slot, (state, key) in enumerate(zip(self._states, self._keys, strict=True)):
            if state is SlotState.FREE:
                assert key is None and slot in self._free and self._holds[slot] == 0, f"{slot=} {key=}"
            elif state is SlotState.PART:
                assert key is None and slot not in self._free and self._keys[slot - 1] is not None, f"{slot=} {key=}"
            else:
                assert key is not None and self._slot_of[key] == slot and slot not in self._free, f"{slot=} {key=}"
