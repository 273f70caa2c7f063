"""The slot table, driven through everything that may be done to it, beside a model that is plainly right."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offmoe.cache.slots import SlotState, SlotTable
from offmoe.core.keys import ExpertKey

KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(4)]
keys = st.sampled_from(KEYS)


class SlotTableMachine(RuleBasedStateMachine):
    """`ready` and `holds` are by key: the model knows no slots but the one that `reserve` returned."""

    @initialize(num_slots=st.integers(1, 6))
    def make(self, num_slots: int) -> None:
        self.table, self.num_slots = SlotTable(num_slots), num_slots
        self.slot_of: dict[ExpertKey, int] = {}
        self.ready: set[ExpertKey] = set()
        self.holds: dict[ExpertKey, int] = {}

    @precondition(lambda self: len(self.slot_of) < self.num_slots)
    @rule(key=keys)
    def reserve(self, key: ExpertKey) -> None:
        if key in self.slot_of:
            with pytest.raises(AssertionError, match="already has slot"):
                self.table.reserve(key)
            return
        slot = self.table.reserve(key)
        assert slot not in self.slot_of.values()
        self.slot_of[key], self.holds[key] = slot, 0

    @rule(key=keys)
    def mark_ready(self, key: ExpertKey) -> None:
        if key not in self.slot_of:
            return
        if key in self.ready:
            with pytest.raises(AssertionError):
                self.table.mark_ready(self.slot_of[key])
        else:
            self.table.mark_ready(self.slot_of[key])
            self.ready.add(key)

    @rule(key=keys)
    def mark_failed(self, key: ExpertKey) -> None:
        if key not in self.slot_of:
            return
        if key in self.ready or self.holds[key]:
            with pytest.raises(AssertionError):
                self.table.mark_failed(self.slot_of[key])
        else:
            self.table.mark_failed(self.slot_of[key])
            self.forget(key)

    @rule(key=keys)
    def hold(self, key: ExpertKey) -> None:
        if key in self.slot_of:
            self.table.hold(self.slot_of[key])
            self.holds[key] += 1

    @rule(key=keys)
    def release(self, key: ExpertKey) -> None:
        if key not in self.slot_of:
            return
        if self.holds[key]:
            self.table.release(self.slot_of[key])
            self.holds[key] -= 1
        else:
            with pytest.raises(AssertionError, match="is not held"):
                self.table.release(self.slot_of[key])

    @rule(key=keys)
    def evict(self, key: ExpertKey) -> None:
        if key not in self.slot_of:
            return
        if key in self.ready and not self.holds[key]:
            assert self.table.evict(key) == self.slot_of[key]
            self.forget(key)
        else:
            with pytest.raises(AssertionError):
                self.table.evict(key)

    @rule(lost=st.sets(keys))
    def recover(self, lost: set[ExpertKey]) -> None:
        """After a call was broken off: holds and reads are forgotten, and slots whose weights are gone."""
        invalid = {self.slot_of[key] for key in lost if key in self.slot_of}
        kept = self.table.recover(lambda slot: slot not in invalid)
        assert set(kept) == self.ready - lost
        for key in set(self.slot_of) - set(kept):
            self.forget(key)
        self.holds = dict.fromkeys(self.holds, 0)

    def forget(self, key: ExpertKey) -> None:
        self.ready.discard(key)
        del self.slot_of[key], self.holds[key]

    @invariant()
    def table_agrees(self) -> None:
        self.table.check_integrity()
        assert len(self.table) == self.num_slots
        assert self.table.num_free == self.num_slots - len(self.slot_of)
        for key in KEYS:
            assert self.table.find(key) == self.slot_of.get(key)
            assert self.table.is_evictable(key) == (key in self.ready and not self.holds[key])
        for key, slot in self.slot_of.items():
            assert self.table.state(slot) is (SlotState.READY if key in self.ready else SlotState.FILLING)
        held = sum(1 for holds in self.holds.values() if holds)
        filling = len(self.slot_of) - len(self.ready)
        assert repr(self.table) == (
            f"<SlotTable [slots: {len(self.ready)} ready, {filling} filling, "
            f"{self.num_slots - len(self.slot_of)} free | {held} held]>"
        )


TestSlotTable = SlotTableMachine.TestCase
TestSlotTable.settings = settings(max_examples=60, stateful_step_count=40)


def test_free_slots_cannot_be_used() -> None:
    table = SlotTable(2)
    for use in (table.hold, table.release, table.mark_ready, table.mark_failed):
        with pytest.raises(AssertionError):
            use(0)
    table.check_integrity()


def test_a_table_has_slots() -> None:
    with pytest.raises(AssertionError, match="num_slots=0"):
        SlotTable(0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: table._free.append(1),
        lambda table: table._slot_of.update({ExpertKey(9, 9): 1}),
        lambda table: table._holds.__setitem__(2, 1),
        lambda table: table._states.__setitem__(0, SlotState.FREE),
        lambda table: table._keys.__setitem__(1, ExpertKey(9, 9)),
    ],
    ids=["free twice", "two keys in a slot", "free slot held", "state lost", "key changed"],
)
def test_damage_is_noticed(damage: object) -> None:
    """The integrity check that other tests rely on can fail."""
    table = SlotTable(3)
    for key in KEYS[:2]:
        table.mark_ready(table.reserve(key))
    table.check_integrity()
    damage(table)  # type: ignore[operator]
    with pytest.raises((AssertionError, KeyError)):
        table.check_integrity()
