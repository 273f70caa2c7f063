"""An on-line comparison of settings: which of them does the same work in less time, here and now.

Settings are tried in alternating blocks of observations, forwards and back (A B B A, A B C C B A), so that a steady
drift falls on all of them alike. A round gives each setting one cost (seconds per work); settings are compared round
by round, by the median of the ratios (outliers do not count) and by a sign test (noise does not count). The reigning
choice is replaced only by one that is faster by a margin and almost surely; one that is slower by much is dropped
after its first block. Comparisons come at growing intervals, and never when more than a small share of all time would
be lost in slower settings. What the settings are is not known here.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from math import comb, log
from statistics import median
from typing import Generic, TypeVar

Setting = TypeVar("Setting", bound=Hashable)

# Chance that rounds of two equal settings look like this. 7 of 7 or 10 of 11 replace the choice, 5 of 5 drop a
# challenger.
REPLACE_CHANCE, DROP_CHANCE = 0.01, 0.05
# A challenger that took this much longer in a block is not tried further in this comparison.
HOPELESS_FACTOR = 2.0
# The choice's cost has risen this much since the last comparison: things have changed, compare soon.
SURPRISE_FACTOR = 1.3
# Observations between comparisons, as multiples of the last comparison's. With the longest, under one in a hundred
# is made in another setting than the choice.
FIRST_GAP, LAST_GAP = 4, 128
# Weight of one more observation in the running cost of the choice.
SMOOTHING = 1 / 16
# Observations that a trial waits for one that compares, in units of its own longest comparison. The other one may
# hardly ever be told anything: a cache that is warm leaves little to compare.
PATIENCE = 4


class Turns:
    """Trials that share one compare one at a time: each would otherwise measure what the other is trying.

    Who has waited long enough begins all the same.
    """

    def __init__(self, first: object | None = None) -> None:
        """`first`: the trial whose turn it is."""
        self._holder = first
        self._num_refused = 0

    def take(self, trial: object, patience: int) -> bool:
        """True when `trial` may begin: it is nobody else's turn, or it was refused `patience` times."""
        if self._holder not in (None, trial) and self._num_refused < patience:
            self._num_refused += 1
            return False
        self._holder, self._num_refused = trial, 0
        return True

    def give_back(self, trial: object) -> None:
        """`trial` compares no longer."""
        if self._holder is trial:
            self._holder = None


class ABTest(Generic[Setting]):
    """Says under which setting to work next (`current`) and is told what came of it (`observe`).

    A block is `block` observations, of which the first `settle` are not counted: they pay for what the setting before
    left behind. The first comparison begins after `first_after` observations; later ones lose at most `max_share` of
    all the time seen.
    """

    def __init__(
        self, settings: Sequence[Setting], *, block: int = 2, settle: int = 0, margin: float = 0.01,
        max_rounds: int = 12, max_share: float = 0.01, first_after: int = 4,
    ) -> None:  # fmt: skip
        """The first of `settings` is the choice until a comparison says otherwise. `turns` may be set afterwards."""
        assert settings and len(set(settings)) == len(settings), f"{settings=}"
        assert block > settle >= 0 and max_rounds > 0 and 0 < max_share <= 1, f"{block=} {settle=} {max_share=}"
        self._settings = tuple(settings)
        self._block, self._settle = block, settle
        self._margin, self._max_rounds, self._max_share = log(1 + margin), max_rounds, max_share
        self.choice: Setting = self._settings[0]
        self.turns: Turns | None = None
        self.num_comparisons = 0
        self.total_s = 0.0
        self.lost_s = 0.0
        self._considered: tuple[Setting, ...] = self._settings
        self._comparison: _Comparison[Setting] | None = None
        self._gap = FIRST_GAP
        self._left = first_after
        self._cost = 0.0
        self._cost_then = 0.0
        self._last_lost_s = 0.0

    def __repr__(self) -> str:
        doing = f"comparing {self._comparison.live}" if self._comparison else f"next in {self._left}"
        return f"<ABTest {self.choice!r} [{doing} | {self.num_comparisons} comparisons, {self.lost_s:.3f} s lost]>"

    @property
    def current(self) -> Setting:
        """The setting for the next observation."""
        return self._comparison.current if self._comparison else self.choice

    @property
    def is_comparing(self) -> bool:
        """A comparison is under way."""
        return self._comparison is not None

    @property
    def contenders(self) -> tuple[Setting, ...]:
        """Settings that are being compared, only the choice when nothing is."""
        return tuple(self._comparison.live) if self._comparison else (self.choice,)

    def consider(self, settings: Collection[Setting]) -> None:
        """Compare only these (and the choice) from the next comparison on; with no other there is none."""
        self._considered = tuple(setting for setting in self._settings if setting in settings)

    def observe(self, setting: Setting, seconds: float, work: float) -> None:
        """`work` (any unit, the same for all settings) took `seconds` under `setting`. No work: only time passed."""
        assert seconds >= 0 and work >= 0, f"{seconds=} {work=}"
        self.total_s += seconds
        if work <= 0 or setting != self.current:
            return
        if self._comparison is not None:
            self._compare(self._comparison, seconds, work)
            return
        cost = seconds / work
        self._cost = cost if not self._cost else self._cost + SMOOTHING * (cost - self._cost)
        self._left -= 1
        surprised = self._cost_then and self._cost > SURPRISE_FACTOR * self._cost_then
        if surprised or (self._left <= 0 and self._can_afford()):
            self._begin()

    @property
    def _longest(self) -> int:
        """Observations of a comparison that takes all its rounds."""
        return self._max_rounds * 2 * len(self._settings) * self._block

    def _can_afford(self) -> bool:
        """The first comparison is on credit, as is one after a surprise, when the choice itself may be what has become
        dear. The others wait until what was lost, and will be, is a small share.
        """
        return not self.num_comparisons or self.lost_s + self._last_lost_s <= self._max_share * self.total_s

    def _begin(self) -> None:
        others = [setting for setting in self._considered if setting != self.choice]
        if not others:
            self._left = 1
        elif self.turns is None or self.turns.take(self, PATIENCE * self._longest):
            self._comparison = _Comparison([self.choice, *others], self._block, self._settle)

    def _compare(self, comparison: _Comparison[Setting], seconds: float, work: float) -> None:
        comparison.observe(seconds, work)
        round_ended = comparison.at_round_end
        if round_ended:
            comparison.judge(self._margin)
        if len(comparison.live) > 1:
            too_long = round_ended and comparison.num_rounds >= self._max_rounds
            too_dear = (
                self.num_comparisons > 0
                and self.lost_s + comparison.lost_s() > self._max_share * self.total_s + self._last_lost_s
            )
            if not (too_long or too_dear):
                return
        self._end(comparison)

    def _end(self, comparison: _Comparison[Setting]) -> None:
        self.num_comparisons += 1
        self._comparison = None
        if self.turns is not None:
            self.turns.give_back(self)
        changed = comparison.best != self.choice
        self.choice = comparison.best
        self._last_lost_s = comparison.lost_s()
        self.lost_s += self._last_lost_s
        self._left = self._gap * comparison.num_observations
        # Also after a change no fresh start: settings that win in turn are compared ever more rarely, too.
        self._gap = max(FIRST_GAP, self._gap // 2) if changed else min(2 * self._gap, LAST_GAP)
        self._cost = self._cost_then = comparison.cost(self.choice)


class _Comparison(Generic[Setting]):
    """One run of rounds. `best` leads, `live` are those not yet beaten, `best` among them."""

    def __init__(self, settings: list[Setting], block: int, settle: int) -> None:
        self.best = settings[0]
        self.live = list(settings)
        self.num_rounds = 0
        self.num_observations = 0
        self._block, self._settle = block, settle
        self._schedule = self._new_round()
        self._in_block = 0
        self._blocks_of: dict[Setting, list[tuple[float, float]]] = {}
        self._round_costs: dict[Setting, list[float]] = {setting: [] for setting in settings}
        self._totals: dict[Setting, tuple[float, float]] = {}

    @property
    def current(self) -> Setting:
        return self._schedule[0]

    @property
    def at_round_end(self) -> bool:
        """The last observation ended a round."""
        return self._in_block == 0 and not self._blocks_of

    def _new_round(self) -> list[Setting]:
        return [*self.live, *reversed(self.live)]

    def observe(self, seconds: float, work: float) -> None:
        """One observation under `current`, which moves on when the block is full."""
        setting = self.current
        self.num_observations += 1
        total_s, total_work = self._totals.get(setting, (0.0, 0.0))
        self._totals[setting] = (total_s + seconds, total_work + work)
        if self._in_block >= self._settle:
            blocks = self._blocks_of.setdefault(setting, [])
            blocks.append((seconds, work))
        self._in_block += 1
        if self._in_block < self._block:
            return
        self._in_block = 0
        self._schedule.pop(0)
        if not self.num_rounds and setting != self.best and self._is_hopeless(setting):
            self._drop(setting)
        if not self._schedule:
            for live in self.live:
                self._round_costs[live].append(_cost(self._blocks_of[live]))
            self._blocks_of = {}
            self.num_rounds += 1
            self._schedule = self._new_round()

    def _is_hopeless(self, setting: Setting) -> bool:
        return _cost(self._blocks_of[setting]) > HOPELESS_FACTOR * _cost(self._blocks_of[self.best])

    def _drop(self, setting: Setting) -> None:
        self.live.remove(setting)
        self._schedule = [other for other in self._schedule if other != setting]

    def judge(self, margin: float) -> None:
        """After a round: let the leader be replaced, then drop those that are slower almost surely."""
        for setting in [setting for setting in self.live if setting != self.best]:
            ratios = self._ratios(setting)
            if -median(ratios) > margin and _chance(sum(r < 0 for r in ratios), len(ratios)) <= REPLACE_CHANCE:
                self.best = setting
        for setting in [setting for setting in self.live if setting != self.best]:
            ratios = self._ratios(setting)
            if median(ratios) > 0 and _chance(sum(r > 0 for r in ratios), len(ratios)) <= DROP_CHANCE:
                self._drop(setting)

    def _ratios(self, setting: Setting) -> list[float]:
        """Logarithm of its cost over the leader's, round by round."""
        pairs = zip(self._round_costs[setting], self._round_costs[self.best], strict=True)
        return [log(max(mine, 1e-30) / max(leaders, 1e-30)) for mine, leaders in pairs]

    def cost(self, setting: Setting) -> float:
        """Seconds per work over the whole comparison; 0 when it was not tried."""
        seconds, work = self._totals.get(setting, (0.0, 0.0))
        return seconds / work if work else 0.0

    def lost_s(self) -> float:
        """Seconds that the leader would have saved, doing all the work of the others."""
        cost = self.cost(self.best)
        if not cost:
            return 0.0
        others = (totals for setting, totals in self._totals.items() if setting != self.best)
        return sum(max(0.0, seconds - work * cost) for seconds, work in others)


def _cost(observations: list[tuple[float, float]]) -> float:
    return sum(seconds for seconds, _ in observations) / sum(work for _, work in observations)


def _chance(wins: int, rounds: int) -> float:
    """That a fair coin shows `wins` or more in `rounds` throws (one-sided sign test)."""
    return float(sum(comb(rounds, k) for k in range(wins, rounds + 1)) / 2**rounds)
