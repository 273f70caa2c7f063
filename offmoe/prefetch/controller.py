"""Fetches ahead of time: what to ask the cache for, in which order, how much at once, and when to take it back.

Lookahead says what a layer will want (`want`); the executor says what it turned out to want (`router_spoke`), when
computations wait for fetches (`demand_begins`, `demand_ends`), and gives time to start things (`pump`). Nothing here
blocks, moves bytes or knows how predictions are made. Keys and integers only: no torch, no threads; the one thread that
runs the model calls everything. What was fetched ahead, and how it ended, is in the cache's ledger
(cache/prefetch_ledger.py).

The queue goes nearest layer first, surest expert first. Rules: predictions have never more than `budget_bytes` under
way; nothing starts while a computation waits for the link; what is READY or coming is not asked for again; what another
layer wants is not evicted for it. The caller holds what a layer needs before it pumps, so a prefetch cannot evict that
either.

In "auto" a guess is fetched only where that is worth it: its chance to come true (prefetch/confidence.py) times what it
would save, against what it costs otherwise. Whether to guess at all is compared on line with doing nothing, by the time
of token passes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from offmoe.core.keys import ExpertKey
from offmoe.online.ab_test import ABTest
from offmoe.prefetch.confidence import PrefetchConfidence, is_worth
from offmoe.prefetch.requests import LayerRequest, PrefetchTarget, RequestedKeys

PrefetchMode = Literal["auto", "off"] | int

# Layers that may run past the time a prediction was made for before it is forgotten: families skip and repeat layers.
SLACK_CALLS = 2
# What a fetch for nothing costs on an idle drive, as a share of what one fetched in time saves: it takes a slot, memory
# bandwidth and processor time. A choice, not a measured optimum: with slots for 10, 25 and 50% of the experts of 6
# layers of Qwen3-30B's shape, bytes read rose by 1, 3 and 12% at it and stall fell by 12, 5 and 8%; where all of the
# next layer's guesses are fetched, by 5, 17 and 76%, and 17, 25 and 38% (benchmarks/2026-11-22-prefetch-disk-again.md,
# one run).
IDLE_PRICE = 0.5
# Weight of one more pass in the share of time for which the link is waited for.
BUSY_SMOOTHING = 1 / 16


class PrefetchController:
    """The queue and the budget of fetches ahead of time into one cache, and whether there are any."""

    def __init__(
        self, cache: PrefetchTarget, *, budget_bytes: int, mode: PrefetchMode = "auto", furthest: int = 1,
        trial: ABTest[int] | None = None, far_when_idle: bool = False,
    ) -> None:  # fmt: skip
        """`mode`: "off", a fixed number of layers ahead, or "auto": `trial` chooses between 0, nothing, and `furthest`.

        `far_when_idle`: what a layer after the next wants starts only when nothing else is under way. A drive's
        reads are long, and those for the next layer would come behind.
        """
        self.cache, self._budget_bytes, self._far_when_idle = cache, budget_bytes, far_when_idle
        self._mode, self._furthest = mode, furthest
        self.trial: ABTest[int] | None = None
        if mode == "auto":
            self.trial = ABTest((0, furthest)) if trial is None else trial
        self.distance = self.trial.current if self.trial is not None else 0 if mode == "off" else int(mode)
        self.chances = None if self.trial is None else PrefetchConfidence()
        self.busy = 0.0
        self._wanted: dict[int, LayerRequest] = {}
        self._keep = RequestedKeys(self._wanted)
        self._num_calls = self._pass_stall_ns = 0
        self._is_demand_waiting = self._is_observing = False

    def __repr__(self) -> str:
        queued = sum(len(wanted.queue) for wanted in self._wanted.values())
        return (
            f"<PrefetchController {self._mode} [distance {self.distance} | {queued} queued, "
            f"{self.num_pending} pending, {self.cache.ahead_bytes} bytes under way]>"
        )

    @property
    def wanted(self) -> Collection[ExpertKey]:
        """Keys that a coming layer is expected to need; evict others first."""
        return self._keep

    @property
    def num_pending(self) -> int:
        """Guesses that were fetched, or are, and whose layers have not run yet."""
        return len(self.cache.guesses)

    @property
    def ab_tests(self) -> list[ABTest[int]]:
        """The comparison that it makes; none where the user has chosen."""
        return [] if self.trial is None else [self.trial]

    @property
    def is_idle(self) -> bool:
        """Nothing is wanted, pending, or to be predicted before the next prompt."""
        return not (self.distance or self._wanted or self.num_pending)

    def is_on(self, distance: int = 1) -> bool:
        """True when a prediction for a layer `distance` layers ahead (0: from its own input) would be acted upon.

        Far ones have to wait while something nearer is queued, and will be predicted better by then.
        """
        if not self.distance or distance > self.distance:
            return False
        is_far = self._far_when_idle and self.chances is not None and distance > 1
        return not (is_far and any(wanted.queue for wanted in self._wanted.values()))

    def request(
        self, layer_idx: int, expert_ids: Iterable[int], *, distance: int, whole_layer: bool = False,
        num_sure: int | None = None,
    ) -> None:  # fmt: skip
        """Layer `layer_idx`, to run `distance` layers from now, will need `expert_ids`, the surest first.

        Replaces what was said of the layer before; what had been started for it and is no longer wanted is taken
        back if its move has not begun. `whole_layer`: a prefill will touch (nearly) all experts. Its bound is slots,
        not bytes: free ones and one layer's share of the others, so that the experts used in decoding stay. It is no
        prediction, and done unless the user has said "off".

        `num_sure`: the layer decodes one token, and its router would choose the first so many now; the others come
        next in its ranking. Then, in "auto", only what is worth it is fetched. None: all of them are.
        """
        self._wanted.pop(layer_idx, None)
        if not (self._mode not in ("off", 0) if whole_layer else 0 < max(distance, 1) <= self.distance):
            return
        experts = queue = list(dict.fromkeys(expert_ids))
        if self.chances is not None and num_sure is not None:
            queue = self._choose(self.chances, layer_idx, distance, queue)
            experts = experts[:num_sure]
        wanted = LayerRequest(experts, queue, due=self._num_calls + distance, whole_layer=whole_layer)
        self._wanted[layer_idx] = wanted
        self._take_back(layer_idx, wanted.experts)

    def _choose(self, chances: PrefetchConfidence, layer_idx: int, distance: int, ranked: list[int]) -> list[int]:
        """Choose what of a guess is worth fetching; fetches of an earlier guess are judged again by this one."""
        cache, price = self.cache, max(IDLE_PRICE, self.busy)
        keys = ((rank, ExpertKey(layer_idx, expert)) for rank, expert in enumerate(ranked))
        missing = [
            (rank, key.expert_idx)
            for rank, key in keys
            if key in cache.guesses or not (cache.is_ready(key) or cache.is_coming(key))
        ]
        found = chances.guessed(layer_idx, distance, missing)
        return [candidate.expert_idx for candidate in found if is_worth(candidate.chance, price)]

    def router_spoke(self, layer_idx: int, expert_ids: Iterable[int]) -> None:
        """The layer runs now and needs `expert_ids`; it is no longer predicted. Call it before anything is used.

        A layer before that never said `demand_ends` (its fetches failed) waits no longer, either.
        """
        self._is_demand_waiting = False
        needed = set(expert_ids)
        self._num_calls += 1
        self._wanted.pop(layer_idx, None)
        if self.chances is not None:
            self.chances.spoke(layer_idx, needed)
        if self.num_pending:
            self.cache.expire_ahead(layer_idx, {ExpertKey(layer_idx, expert) for expert in needed})
        for stale in [idx for idx, other in self._wanted.items() if other.due + SLACK_CALLS < self._num_calls]:
            del self._wanted[stale]

    def demand_begins(self) -> None:
        """A computation is about to wait for fetches: nothing is started until `demand_ends`."""
        self._is_demand_waiting = True

    def demand_ends(self, stall_ns: int = 0) -> None:
        """It waits no longer; it stood still for `stall_ns`."""
        self._is_demand_waiting = False
        self._pass_stall_ns += stall_ns

    def stall_measured(self, stall_ns: int) -> None:
        """Instead of a number for `demand_ends`, later: a device's stream had stood still for `stall_ns`."""
        self._pass_stall_ns += stall_ns

    def pass_ended(self, seconds: float, *, num_tokens: int = 1) -> None:
        """A forward pass over `num_tokens` positions took `seconds`; those of one token are learnt from.

        The distance stays the same within a pass. `busy` is the share of recent passes that stood still, 0 to 1.
        """
        if num_tokens != 1:
            return
        share = min(1.0, self._pass_stall_ns / max(seconds * 1e9, 1.0))
        self.busy += BUSY_SMOOTHING * (share - self.busy)
        self._pass_stall_ns = 0
        if self.trial is not None:
            self._is_observing = True
            self.trial.observe(self.distance, seconds, 1)
            self._is_observing = False
            self.distance = self.trial.current

    def pump(self) -> None:
        """Start what the budget allows. Cheap when there is nothing to do; call it whenever there is a moment."""
        self.cache.poll()
        if self._is_demand_waiting:
            return
        for layer_idx, wanted in sorted(self._wanted.items(), key=lambda item: item[1].due):
            if not self._pump_layer(layer_idx, wanted):
                return

    def _pump_layer(self, layer_idx: int, wanted: LayerRequest) -> bool:
        """Start what `wanted` has queued; False when nothing more can be started now, for any layer."""
        cache, queue = self.cache, wanted.queue
        is_far = self._far_when_idle and wanted.due > self._num_calls + 1
        while queue:
            key = ExpertKey(layer_idx, queue[0])
            if not (cache.is_ready(key) or cache.is_coming(key)):
                if wanted.whole_layer:
                    if not self._has_spare_slot():
                        return True
                elif cache.ahead_bytes + cache.num_bytes(key) > self._budget_bytes or (is_far and cache.ahead_bytes):
                    return False
                if not cache.start_ahead(key, keep=self._keep):
                    return False
            queue.popleft()
        return True

    def _has_spare_slot(self) -> bool:
        """A slot is free, or unused prefetches have less than one layer's share: the ring a prefill goes through."""
        return self.cache.slots.num_free > 0 or self.num_pending < max(1, self.cache.slots_per_layer)

    def reset(self) -> None:
        """At rest, after a call was broken off anywhere (Ctrl-C) and the cache has recovered, or a sequence ended.

        Nothing is wanted. What was learnt stays, but for a comparison whose sums were broken off with the call.
        """
        self._wanted.clear()
        if self.chances is not None:
            self.chances.forget_open()
        self._is_demand_waiting, self._pass_stall_ns = False, 0
        if self.trial is None:
            return
        if self._is_observing:
            turns = self.trial.turns
            if turns is not None:
                turns.give_back(self.trial)
            self.trial = ABTest((0, self._furthest))
            self.trial.turns = turns
        self._is_observing = False
        self.distance = self.trial.current

    def as_dict(self) -> dict[str, object]:
        """Settings in force and the cache's ledger of prefetches, for `stats()`."""
        counters = self.cache.counters
        chances = {} if self.chances is None else {"chances": self.chances.as_dict()}
        return {
            "mode": self._mode, "distance": self.distance, "busy": round(self.busy, 4), **chances,
            "ahead_bytes": counters.ahead_bytes, "ahead_used_bytes": counters.ahead_used_bytes,
            "ahead_wasted_bytes": counters.ahead_wasted_bytes,
        }  # fmt: skip

    def _take_back(self, layer_idx: int, wanted: Collection[int]) -> None:
        """Cancel what is under way for the layer and not in `wanted`, if it can be."""
        for key in [key for key in self.cache.guesses if key.layer_idx == layer_idx and key.expert_idx not in wanted]:
            self.cache.cancel_ahead(key)
