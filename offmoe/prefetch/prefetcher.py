"""Fetches ahead of time: what to ask the cache for, in which order, how much at once, and when to take it back.

Whoever predicts says what a layer will want (`want`); the executor says what it turned out to want (`router_spoke`),
when computations wait for fetches (`demand_begins`, `demand_ends`), and gives time to start things (`pump`). Nothing
here blocks, moves bytes or knows how predictions are made. Keys and integers only: no torch, no threads; the one
thread that runs the model calls everything.

The queue goes nearest layer first, surest expert first. Rules: predictions have never more than `budget_bytes` under
way; nothing starts while a computation waits for the link; what is READY or coming is not asked for again; what another
layer wants is not evicted for it. The caller holds what a layer needs before it pumps, so a prefetch cannot evict that
either.

In "auto" a guess is fetched only where that is worth it: its chance to come true (prefetch/chances.py) times what it
would save, against what it costs otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from offmoe.base.keys import ExpertKey
from offmoe.base.trial import Trial
from offmoe.prefetch.audit import Audit
from offmoe.prefetch.chances import Chances, is_worth
from offmoe.prefetch.switch import Mode, Switch
from offmoe.prefetch.wants import AheadCache, Wanted, WantedKeys

# Layers that may run past the time a prediction was made for before it is forgotten: families skip and repeat layers.
SLACK_CALLS = 2
# What a fetch for nothing costs on an idle drive, as a share of what one fetched in time saves: it takes a slot, memory
# bandwidth and processor time. A choice, not a measured optimum: with slots for 10, 25 and 50% of the experts of 6
# layers of Qwen3-30B's shape, bytes read rose by 1, 3 and 12% at it and stall fell by 12, 5 and 8%; where all of the
# next layer's guesses are fetched, by 5, 17 and 76%, and 17, 25 and 38% (benchmarks/2026-11-22-prefetch-disk-again.md,
# one run).
IDLE_PRICE = 0.5


class Prefetcher:
    """The queue, the budget and the books of fetches ahead of time into one cache."""

    def __init__(
        self, cache: AheadCache, *, budget_bytes: int, mode: Mode = "auto", ns_per_byte: float = 0.0,
        switch: Switch | None = None, far_when_idle: bool = False,
    ) -> None:  # fmt: skip
        """`ns_per_byte`: the stall that a byte fetched on demand costs, believed until one was fetched.

        `far_when_idle`: what a layer after the next wants starts only when nothing else is under way. A drive's
        reads are long, and those for the next layer would come behind.

        The cache's books must have this object as their listener; it is not set here.
        """
        self.cache, self._budget_bytes, self._far_when_idle = cache, budget_bytes, far_when_idle
        self.audit = Audit(ns_per_byte)
        self.switch = Switch(mode) if switch is None else switch
        self.chances = Chances() if self.switch.trial is not None else None
        self._wanted: dict[int, Wanted] = {}
        self._keep = WantedKeys(self._wanted)
        self._pending: dict[int, dict[int, tuple[int, int]]] = {}  # bytes, distance
        self._unsettled: list[tuple[int, int, int]] = []
        self.num_pending = 0
        self._num_calls = 0
        self._is_demand_waiting = False
        self._late_wait_ns = 0
        self._late: dict[ExpertKey, int] = {}  # the distance of late ones, whose wait may be measured later
        self._cancelling: ExpertKey | None = None

    def __repr__(self) -> str:
        queued = sum(len(wanted.queue) for wanted in self._wanted.values())
        total = self.audit.total()
        return (
            f"<Prefetcher [{queued} queued, {self.num_pending} pending, {self.cache.ahead_bytes} bytes under way | "
            f"{total.useful} useful, {total.wasted} wasted | {self.switch!r}]>"
        )

    @property
    def wanted(self) -> Collection[ExpertKey]:
        """Keys that a coming layer is expected to need; evict others first."""
        return self._keep

    @property
    def trials(self) -> list[Trial[int]]:
        """The comparison that it makes; none where the user has chosen."""
        return [] if self.switch.trial is None else [self.switch.trial]

    @property
    def is_idle(self) -> bool:
        """Nothing is wanted, pending, or to be predicted before the next prompt."""
        return not (self.switch.distance or self._wanted or self.num_pending)

    def is_on(self, layer_idx: int, distance: int = 1) -> bool:
        """True when a prediction for the layer, `distance` layers ahead, would be acted upon: else make none.

        Far ones have to wait while something nearer is queued, and will be predicted better by then.
        """
        if not self._is_allowed(layer_idx, distance):
            return False
        is_far = self._far_when_idle and self.chances is not None and distance > 1
        return not (is_far and any(wanted.queue for wanted in self._wanted.values()))

    def _is_allowed(self, layer_idx: int, distance: int) -> bool:
        return 0 < self.switch.distance >= distance and self.switch.layer_is_on(layer_idx, distance)

    def want(
        self, layer_idx: int, expert_ids: Iterable[int], *, distance: int, predict_ns: int = 0,
        whole_layer: bool = False, num_sure: int | None = None, hidden_ns: int = 0,
    ) -> None:  # fmt: skip
        """Layer `layer_idx`, to run `distance` layers from now, will need `expert_ids`, the surest first.

        Replaces what was said of the layer before; what had been started for it and is no longer wanted is taken
        back if its move has not begun. `predict_ns`: time that the prediction took, `hidden_ns` of it while the
        computation stood still anyway. `whole_layer`: a prefill will
        touch (nearly) all experts. Its bound is slots, not bytes: free ones and one layer's share of the others, so
        that the experts used in decoding stay. It is not subject to what the switch learns from decoding.

        `num_sure`: the layer decodes one token, and its router would choose the first so many now; the others come
        next in its ranking. Then, in "auto", only what is worth it is fetched. None: all of them are.
        """
        if predict_ns:
            self.audit.spent_predicting(layer_idx, predict_ns, hidden_ns, distance=distance)
            if self._is_demand_waiting:
                self._unsettled.append((layer_idx, distance, predict_ns))
        self._wanted.pop(layer_idx, None)
        if not (self.switch.allows_whole_layers if whole_layer else self._is_allowed(layer_idx, distance)):
            return
        experts = queue = list(dict.fromkeys(expert_ids))
        if self.chances is not None and num_sure is not None:
            queue = self._choose(self.chances, layer_idx, distance, queue)
            experts = experts[:num_sure]
        due = self._num_calls + distance
        wanted = Wanted(experts, queue, due=due, distance=distance, whole_layer=whole_layer)
        self._wanted[layer_idx] = wanted
        self._take_back(layer_idx, wanted.experts)

    def _choose(self, chances: Chances, layer_idx: int, distance: int, ranked: list[int]) -> list[int]:
        """What of a guess is worth fetching; what was fetched for an earlier guess is judged again by this one."""
        cache, price = self.cache, max(IDLE_PRICE, self.audit.busy)
        begun = self._pending.get(layer_idx, {})
        keys = ((rank, ExpertKey(layer_idx, expert)) for rank, expert in enumerate(ranked))
        missing = [
            (rank, key.expert_idx)
            for rank, key in keys
            if key.expert_idx in begun or not (cache.is_ready(key) or cache.is_coming(key))
        ]
        found = chances.guessed(layer_idx, distance, missing)
        return [candidate.expert_idx for candidate in found if is_worth(candidate.chance, price)]

    def router_spoke(self, layer_idx: int, expert_ids: Iterable[int]) -> None:
        """The layer runs now and needs `expert_ids`; it is no longer predicted. Call it before anything is used.

        A layer before that never said `demand_ends` (its fetches failed) waits no longer, either.
        """
        self._is_demand_waiting, self._late_wait_ns = False, 0
        needed = set(expert_ids)
        self._num_calls += 1
        wanted = self._wanted.pop(layer_idx, None)
        predicted = wanted.experts if wanted is not None else frozenset[int]()
        queue = wanted.queue if wanted is not None else ()
        pending = self._pending.get(layer_idx, {})
        behind = sum(self.cache.num_bytes(ExpertKey(layer_idx, expert)) for expert in queue if expert in needed)
        self.audit.called(
            layer_idx, predicted=len(predicted), needed=len(needed), named=len(predicted & needed),
            covered=len(needed.intersection(pending)), behind_bytes=behind,
            distance=wanted.distance if wanted is not None else 1,
        )  # fmt: skip
        if self.chances is not None:
            self.chances.spoke(layer_idx, needed)
        if pending:
            self._take_back(layer_idx, needed)
            self.cache.expire_ahead(layer_idx, {ExpertKey(layer_idx, expert) for expert in needed})
        for stale in [idx for idx, other in self._wanted.items() if other.due + SLACK_CALLS < self._num_calls]:
            del self._wanted[stale]
        self.switch.layer_called(layer_idx, self.audit)

    def demand_begins(self) -> None:
        """A computation is about to wait for fetches: nothing is started until `demand_ends`."""
        self._is_demand_waiting = True

    def demand_ends(self, num_bytes: int = 0, stall_ns: int = 0) -> None:
        """It waits no longer. `num_bytes` were fetched for it on demand, late prefetches not counted; it stood still
        for `stall_ns`, the waits for late prefetches included (they are known here, and taken off). Of the time spent
        predicting since `demand_begins`, as much as it stood still afterwards was no loss.
        """
        self._is_demand_waiting = False
        self.audit.demand_ended(num_bytes, stall_ns, self._late_wait_ns)
        for layer_idx, distance, predict_ns in self._unsettled:
            hidden_ns = min(predict_ns, stall_ns)
            self.audit.layer(layer_idx, distance).predict_hidden_ns += hidden_ns
            stall_ns -= hidden_ns
        self._unsettled.clear()

    def stall_measured(self, num_bytes: int, stall_ns: int, late_ns: Mapping[ExpertKey, int]) -> None:
        """Instead of numbers for `demand_ends`, later: a device's stream stood still for `stall_ns`, of that for
        each late prefetch `late_ns`, and `num_bytes` were fetched on demand meanwhile.
        """
        for key, waited_ns in late_ns.items():
            if key in self._late:
                self.audit.waited(key.layer_idx, waited_ns, distance=self._late.pop(key))
        self.audit.demand_ended(num_bytes, stall_ns, sum(late_ns.values()))

    def pass_ended(self, seconds: float, *, num_tokens: int = 1) -> None:
        """A forward pass over `num_tokens` positions took `seconds`. The switch learns from those of one token."""
        if num_tokens == 1:
            self.audit.pass_ended(seconds)
        self.switch.pass_ended(seconds, num_tokens=num_tokens)

    def pump(self) -> None:
        """Start what the budget allows. Cheap when there is nothing to do; call it whenever there is a moment."""
        self.cache.poll()
        if self._is_demand_waiting:
            return
        for layer_idx, wanted in sorted(self._wanted.items(), key=lambda item: item[1].due):
            if not self._pump_layer(layer_idx, wanted):
                return

    def _pump_layer(self, layer_idx: int, wanted: Wanted) -> bool:
        """Start what `wanted` has queued; False when nothing more can be started now, for any layer."""
        cache, queue = self.cache, wanted.queue
        is_far = self._far_when_idle and wanted.due > self._num_calls + 1
        while queue:
            key = ExpertKey(layer_idx, queue[0])
            if not (cache.is_ready(key) or cache.is_coming(key)):
                num_bytes = cache.num_bytes(key)
                if wanted.whole_layer:
                    if not self._has_spare_slot():
                        return True
                elif cache.ahead_bytes + num_bytes > self._budget_bytes or (is_far and cache.ahead_bytes):
                    return False
                if not cache.start_ahead(key, keep=self._keep):
                    return False
                self._pending.setdefault(layer_idx, {})[key.expert_idx] = num_bytes, wanted.distance
                self.num_pending += 1
                self.audit.started(layer_idx, num_bytes, distance=wanted.distance)
            queue.popleft()
        return True

    def _has_spare_slot(self) -> bool:
        """A slot is free, or unused prefetches have less than one layer's share: the ring a prefill goes through."""
        return self.cache.slots.num_free > 0 or self.num_pending < max(1, self.cache.slots_per_layer)

    def used_ahead(self, key: ExpertKey, *, late: bool, waited_ns: int) -> None:
        """The cache tells: a prefetch was used."""
        ended = self._end_pending(key)
        if ended is not None:
            self._late_wait_ns += waited_ns
            num_bytes, distance = ended
            if late:
                self._late[key] = distance
            self.audit.used(key.layer_idx, num_bytes, late=late, waited_ns=waited_ns, distance=distance)

    def wasted_ahead(self, key: ExpertKey) -> None:
        """The cache tells: a prefetch came to nothing."""
        ended = self._end_pending(key)
        if ended is None:
            return
        num_bytes, distance = ended
        if key == self._cancelling:
            self.audit.cancelled(key.layer_idx, num_bytes, distance=distance)
        else:
            self.audit.wasted(key.layer_idx, num_bytes, distance=distance)

    def reset(self) -> None:
        """At rest, after a call was broken off anywhere (Ctrl-C) and the cache has recovered, or a sequence ended.

        Nothing is wanted or pending; what was pending counts as wasted. What was learnt stays.
        """
        self._wanted.clear()
        self._unsettled.clear()
        self._late.clear()
        if self.chances is not None:
            self.chances.forget_open()
        self._pending, self.num_pending = {}, 0
        self._is_demand_waiting, self._late_wait_ns, self._cancelling = False, 0, None
        self.audit.give_up_pending()
        self.switch.reset()

    def as_dict(self) -> dict[str, object]:
        """What it does and did, for `stats()`."""
        chances = {} if self.chances is None else {"chances": self.chances.as_dict()}
        return {"switch": self.switch.as_dict(), **chances, **self.audit.as_dict()}

    def _take_back(self, layer_idx: int, wanted: Collection[int]) -> None:
        """Cancel what is under way for the layer and not in `wanted`, if it can be."""
        pending = self._pending.get(layer_idx)
        for expert in [expert for expert in pending if expert not in wanted] if pending else ():
            key = ExpertKey(layer_idx, expert)
            if self.cache.is_coming(key):
                self._cancelling = key
                self.cache.cancel_ahead(key)
                self._cancelling = None

    def _end_pending(self, key: ExpertKey) -> tuple[int, int] | None:
        """Its bytes, and the distance of the guess that it was begun for."""
        ended = self._pending.get(key.layer_idx, {}).pop(key.expert_idx, None)
        if ended is not None:
            self.num_pending -= 1
        return ended
