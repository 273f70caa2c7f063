"""Which policy would fetch the fewest bytes? Shadow caches of all of them, on a sample of what the routers choose.

A sample, because all policies on all calls would cost more than a good one saves (times are in `Race`): some layers,
whose shadow caches have these layers' share of the slots, and, after a beginning, some of the passes, in bursts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from offmoe.cache.policy import POLICY_NAMES, make_policy
from offmoe.cache.shadow import ShadowCache
from offmoe.trace.recorder import PADDING

# Layers that are watched, and the fewest slots that shadow caches should have: with fewer, rounding decides.
WATCHED_LAYERS, FEWEST_SLOTS = 4, 32
# Passes that are watched first without a gap; then bursts with gaps between them. The first passes of a burst are not
# counted: what is in the shadow caches then is out of date.
WATCHED_FIRST, BURST, GAP, SETTLE = 384, 120, 240, 16
# A window of so many expert lookups is judged at once; earlier ones count less and less.
WINDOW_LOOKUPS, FADING = 512, 0.8
# The choice is replaced by what is this much better over the faded windows, and was better in the last ones, too.
MARGIN, STREAK = 0.01, 2
# Plain LRU comes back after so many windows in a row in which it was better than the choice.
BASELINE_STREAK = 4
# After so many passes the fetches of the real cache are counted; so much more or less than before, and a burst begins.
CHECKED_PASSES, SURPRISE = 48, 1.5
BASELINE = "lru"
# Candidates beside the policies themselves: with a share of the slots for each layer. Measured: better at up to 4 times
# the slots that a token needs where a layer's experts are used evenly, worse where they are not.
PER_LAYER = "/layer"
PER_LAYER_NAMES = (f"lfru{PER_LAYER}",)


class Race:
    """Told of layer calls, says which policy fetches least (`choice`).

    It begins with `first`, replaces the choice only by one that is clearly better, and returns to plain LRU as soon as
    the choice is worse than that.
    """

    def __init__(
        self, num_slots: int, experts_bytes: Sequence[int], *, quota: bool = False, first: str = BASELINE
    ) -> None:
        """`experts_bytes`: of one expert, for each layer. `quota`: every candidate has a share for each layer."""
        names = POLICY_NAMES if quota else (*POLICY_NAMES, *PER_LAYER_NAMES)
        num_layers = len(experts_bytes)
        num_watched = min(num_layers, max(WATCHED_LAYERS, -(-FEWEST_SLOTS * num_layers // num_slots)))
        layers = sorted({(2 * idx + 1) * num_layers // (2 * num_watched) for idx in range(num_watched)})
        self._number_of = {layer_idx: number for number, layer_idx in enumerate(layers)}
        self._bytes = [experts_bytes[layer_idx] for layer_idx in layers]
        slots = max(1, round(num_slots * len(layers) / num_layers))
        self.choice, self.num_switches = first, 0
        self.total_bytes = dict.fromkeys(names, 0)
        self._shadows = {
            name: ShadowCache(
                make_policy(name.removesuffix(PER_LAYER)), slots, len(layers), quota=quota or name.endswith(PER_LAYER)
            )
            for name in names
        }
        self._window = dict.fromkeys(names, 0)
        self._faded = dict.fromkeys(names, 0.0)
        self._won = dict.fromkeys(names, 0)
        self._lookups = self._num_passes = self._num_fetched = self._fetched_before = 0
        self._watch_until = WATCHED_FIRST
        self._is_watching = self._is_counting = True
        self._is_new_pass = False

    def __repr__(self) -> str:
        return f"<Race [{self.choice} of {len(self._shadows)} | {self.num_switches} switches]>"

    def token_pass(self) -> None:
        """A pass begins."""
        self._num_passes += 1
        self._is_new_pass = True
        if self._num_passes % CHECKED_PASSES == 0:
            self._check_fetched()
        if self._num_passes >= self._watch_until + GAP:
            self._watch_until = self._num_passes + BURST
        self._is_watching = self._num_passes <= self._watch_until
        self._is_counting = self._is_watching and (
            self._num_passes <= WATCHED_FIRST or self._num_passes > self._watch_until - BURST + SETTLE
        )
        if self._lookups >= WINDOW_LOOKUPS:
            self._judge()

    def fetched(self) -> None:
        """The real cache fetches an expert on demand."""
        self._num_fetched += 1

    def _check_fetched(self) -> None:
        now, self._num_fetched = self._num_fetched, 0
        before, self._fetched_before = self._fetched_before, now
        if not self._is_watching and not before / SURPRISE <= now <= before * SURPRISE:
            self._watch_until = self._num_passes + BURST

    def call(self, layer_idx: int, ids: Sequence[int]) -> None:
        """A layer call chose `ids`, each as often as tokens chose it."""
        number = self._number_of.get(layer_idx)
        if number is None or not self._is_watching:
            return
        rows = dict(sorted(Counter(ids).items()))
        rows.pop(PADDING, None)
        starts, self._is_new_pass = self._is_new_pass, False
        self._lookups += len(rows) if self._is_counting else 0
        for name, shadow in self._shadows.items():
            missed = len(shadow.call(number, rows, starts_pass=starts).misses)
            if missed and self._is_counting:
                self._window[name] += missed * self._bytes[number]

    def recover(self) -> None:
        """Make all shadow caches whole again after a call that was broken off between any two lines."""
        for shadow in self._shadows.values():
            shadow.recover()

    def _judge(self) -> None:
        """At the end of a window."""
        mine = self._window[self.choice]
        for name, num_bytes in self._window.items():
            self._won[name] = self._won[name] + 1 if num_bytes < (1 - MARGIN) * mine else 0
            self._faded[name] = FADING * self._faded[name] + num_bytes
            self.total_bytes[name] += num_bytes
            self._window[name] = 0
        self._lookups = 0
        best = min(self._faded, key=lambda name: (self._faded[name], name))
        if self._faded[best] < (1 - MARGIN) * self._faded[self.choice] and self._won[best] >= STREAK:
            self._choose(best)
        elif self._won[BASELINE] >= BASELINE_STREAK:
            self._choose(BASELINE)

    def _choose(self, name: str) -> None:
        self.choice, self.num_switches = name, self.num_switches + 1
        self._won = dict.fromkeys(self._won, 0)
        if name == BASELINE:  # what came before speaks for others, and would bring them back
            self._faded = dict.fromkeys(self._faded, 0.0)
