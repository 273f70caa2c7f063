"""Decides for each layer call which misses are copied to the device and which the CPU computes, and learns from it.

The costs, measured at load with the kernels that serve misses, are a model. Its decisions are compared on line with
the two that need no model: copy everything, compute everything on the CPU. So a wrong model costs a little time and no
more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offmoe.machine.costs import Costs
from offmoe.online.ab_test import ABTest
from offmoe.placement.choose import Miss, Placement, PlacementMode, decide, makespan_s

# Layer calls in a block of the comparison, and those at its beginning that are not counted (a copy or a product of the
# setting before may run into the first). Many rounds: those that are not told apart sooner are nearly equal.
BLOCK_CALLS, SETTLE_CALLS, MAX_ROUNDS = 6, 1, 32
# A setting that takes this much longer than the model's best is compared only after so many calls. The model may be
# wrong by two in either rate; trying what is four times slower for a block costs less than a token.
HOPELESS_FACTOR, HOPELESS_AFTER = 4.0, 1024
# Settings are the same when they place every number of misses up to this alike.
MANY_MISSES = 8
# Weight of one more call in running means.
SMOOTHING = 1 / 32


class MissScheduler:
    """Call `place` once in every layer call, also when nothing was missed.

    The time from one `place` to the next layer's is what a setting is judged by: it holds everything the setting
    caused, also where work on the device ends later than the call that queued it.
    """

    def __init__(
        self, costs: Costs, *, mode: PlacementMode = PlacementMode.AUTO, trial: ABTest[PlacementMode] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.costs, self.mode = costs, mode
        self.trial = trial or ABTest(list(PlacementMode), block=BLOCK_CALLS, settle=SETTLE_CALLS, max_rounds=MAX_ROUNDS)
        self._clock = clock
        self._call: _Call | None = None
        self._overhead_s = 0.0
        self._num_misses = 0.0
        self._considered_at: tuple[int, int, bool] | None = None
        self._calls_until_all = HOPELESS_AFTER

    def __repr__(self) -> str:
        return f"<MissScheduler {self.mode.value} {self.trial}>"

    def place(self, layer_idx: int, misses: Sequence[Miss]) -> list[Placement]:
        """A placement for each miss of this layer call, in order."""
        now_s = self._clock()
        if self._call is not None and layer_idx == self._call.layer_idx + 1:
            self._end_call(self._call, now_s - self._call.begin_s)
        judged = self._is_bound_by_bytes(misses)
        setting = self._setting(misses, judged=judged)
        placements = decide(misses, self.costs, setting)
        judged = judged and self._matters(misses, placements)
        self._call = _Call(layer_idx, now_s, setting, misses, judged)
        return placements

    def _setting(self, misses: Sequence[Miss], *, judged: bool) -> PlacementMode:
        if self.mode is not PlacementMode.AUTO or not judged:
            return self.mode
        self._num_misses += SMOOTHING * (len(misses) - self._num_misses) if self._num_misses else len(misses)
        self._consider()
        return self.trial.current

    def _is_bound_by_bytes(self, misses: Sequence[Miss]) -> bool:
        """Decoding is compared. A prefill's misses are bound by the CPU's arithmetic, which the model knows."""
        costs = self.costs
        return bool(misses) and all(
            m.num_rows == 1 or m.flops / costs.cpu_flops_per_s <= m.num_bytes / costs.cpu_bytes_per_s for m in misses
        )

    def _matters(self, misses: Sequence[Miss], placements: list[Placement]) -> bool:
        """False while settings are compared that all place these misses alike: such calls are but noise."""
        if not self.trial.is_comparing:
            return True
        return any(decide(misses, self.costs, mode) != placements for mode in self.trial.contenders)

    def _consider(self) -> None:
        """Spare the next comparison what the model holds to be hopeless, most of the time."""
        self._calls_until_all -= 1
        typical = max(1, round(self._num_misses))
        at = (typical, self.trial.num_comparisons, self._calls_until_all <= 0)
        if at == self._considered_at:
            return
        if self._considered_at is not None and self._considered_at[2] and at[1] != self._considered_at[1]:
            self._calls_until_all = HOPELESS_AFTER
        self._considered_at = at
        self.trial.consider(list(PlacementMode) if self._calls_until_all <= 0 else self._hopeful(typical))

    def _hopeful(self, typical: int) -> list[PlacementMode]:
        """Placements that might be faster than the model's best, and is not the same under another name."""
        hopeful = [PlacementMode.AUTO]
        for mode in (PlacementMode.STREAM, PlacementMode.CPU):
            sets = [[Miss(num_bytes=1 << 24)] * num for num in range(1, max(MANY_MISSES, typical) + 1)]
            if any(self._placed(misses, mode) != self._placed(misses, PlacementMode.AUTO) for misses in sets):
                best_s, mine_s = (self._forecast_s(sets[typical - 1], m) for m in (PlacementMode.AUTO, mode))
                hopeful += [mode] if mine_s <= HOPELESS_FACTOR * best_s else []
        return hopeful

    def _placed(self, misses: Sequence[Miss], mode: PlacementMode) -> list[Placement]:
        return decide(misses, self.costs, mode)

    def _forecast_s(self, misses: Sequence[Miss], mode: PlacementMode) -> float:
        return makespan_s(misses, self._placed(misses, mode), self.costs)

    def _end_call(self, call: _Call, seconds: float) -> None:
        """The next layer has begun `seconds` after `call` did."""
        if not call.misses:
            weight = SMOOTHING if self._overhead_s else 1.0
            self._overhead_s += weight * (seconds - self._overhead_s)
            return
        if self.mode is PlacementMode.AUTO and call.is_judged:
            self.trial.observe(call.setting, seconds, self._expected_s(call.misses))

    def _expected_s(self, misses: Sequence[Miss]) -> float:
        """The yardstick for calls with more or fewer misses, the same for all settings."""
        costs = self.costs
        rate = costs.link_beside_cpu_bytes_per_s + costs.cpu_beside_link_bytes_per_s
        return self._overhead_s + sum(miss.num_bytes for miss in misses) / rate


@dataclass(frozen=True, slots=True)
class _Call:
    """The layer call under way."""

    layer_idx: int
    begin_s: float
    setting: PlacementMode
    misses: Sequence[Miss]
    is_judged: bool
