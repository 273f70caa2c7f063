"""A picture of experts after a token, for people who watch: hits, fetches, and what lies in slots."""

from __future__ import annotations

from typing import Any

from offmoe.engine.engine import Engine
from offmoe.engine.parts import parts_of
from offmoe.trace.recorder import PADDING

HIT, FETCHED, AHEAD, IN_SLOT, ON_DISK = "hfas."


class ExpertView:
    """Looks at an engine between two of its steps, on the thread that runs them.

    In a look's `layers` each layer is a text with a letter for each expert: `h` used and in a slot since the last look,
    `f` used and fetched for it, `a` fetched ahead and not used yet, `s` in a slot, `.` on disk only (with a device:
    not on it).
    """

    def __init__(self, engine: Engine) -> None:
        self._parts = parts_of(engine)
        self._sizes = [layer.num_experts for layer in self._parts.experts.layers]
        self._before = self._slots()

    def look(self) -> dict[str, Any]:
        """The picture now, and its numbers."""
        now, before = self._slots(), self._before
        self._before = now
        rows = [[ON_DISK] * size for size in self._sizes]
        num_ahead = 0
        for layer_idx, expert_idx in now:
            is_new = (layer_idx, expert_idx) not in before
            num_ahead += is_new
            rows[layer_idx][expert_idx] = AHEAD if is_new else IN_SLOT
        num_hits = num_fetched = 0
        for layer_idx, expert_idx in self._used():
            num_ahead -= rows[layer_idx][expert_idx] == AHEAD
            is_hit = (layer_idx, expert_idx) in before
            rows[layer_idx][expert_idx] = HIT if is_hit else FETCHED
            num_hits += is_hit
            num_fetched += not is_hit
        return {
            "layers": ["".join(row) for row in rows], "hits": num_hits, "fetched": num_fetched, "ahead": num_ahead,
            "in_slots": len(now),
        }  # fmt: skip

    def _slots(self) -> set[tuple[int, int]]:
        taken = self._parts.serving.cache.slots.keys()
        return {(key.layer_idx, key.expert_idx) for key in taken}

    def _used(self) -> set[tuple[int, int]]:
        """Experts of the last call of each layer."""
        calls = self._parts.serving.recorder.latest(len(self._sizes))
        return {(call.layer_idx, idx) for call in calls for idx in call.ids if idx != PADDING}
