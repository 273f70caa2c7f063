"""A shadow cache: an expert cache with keys alone, no slots, no bytes, no waiting, nothing fetched ahead of time."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from offmoe.cache.keeping import MAX_READS_IN_FLIGHT, experts_to_keep
from offmoe.cache.per_layer import PerLayerPolicy, fair_shares
from offmoe.cache.policy import hand_over
from offmoe.cache.ranking import Policy
from offmoe.core.keys import ExpertKey


@dataclass(frozen=True, slots=True)
class CallResult:
    """Result of one layer call: expert ids found and fetched, and how many experts had to go."""

    hits: list[int]
    misses: list[int]
    num_evictions: int


class ShadowCache:
    """An ExpertCache and its executor on the CPU without prefetch, as far as keys go.

    A call is one event: its experts are looked up before any is fetched, and none of them is a victim while it is used.
    The executor lets fetched experts go one by one, in order, whenever the next fetch may begin, so what happens does
    not depend on when bytes arrive.
    """

    def __init__(self, policy: Policy, num_slots: int, num_layers: int, *, quota: bool = False) -> None:
        """`quota`: give each layer its fair share, with policies as `policy`, which must be new."""
        assert num_slots > 0 and num_layers > 0, f"{num_slots=} {num_layers=}"
        if quota:
            policy = PerLayerPolicy(type(policy), fair_shares(num_slots, num_layers))
        self.policy = policy
        self._num_slots, self._share = num_slots, num_slots // num_layers
        self._cached: set[ExpertKey] = set()

    def __repr__(self) -> str:
        return f"<ShadowCache [{len(self._cached)} of {self._num_slots} slots | {self.policy!r}]>"

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._cached

    def call(self, layer_idx: int, rows_by_expert: Mapping[int, int], *, starts_pass: bool) -> CallResult:
        """One event. `rows_by_expert` in order of expert id, as the executor serves them."""
        if starts_pass:
            self.policy.token_pass()
        cached, policy = self._cached, self.policy
        hits: list[int] = []
        misses: list[int] = []
        for idx in rows_by_expert:
            (hits if (layer_idx, idx) in cached else misses).append(idx)
        keep = experts_to_keep(rows_by_expert, self._share)
        for idx in hits:
            if idx in keep:
                policy.touched(ExpertKey(layer_idx, idx))
        if not misses:
            return CallResult(hits, misses, 0)
        return CallResult(hits, misses, self._fetch(layer_idx, hits, misses, keep))

    def recover(self) -> None:
        """Give policy and cache the same keys again after a call that was broken off between any two lines (Ctrl-C)."""
        hand_over(self.policy, self.policy, set(self._cached))

    def _fetch(self, layer_idx: int, hits: list[int], misses: list[int], keep: set[int]) -> int:
        """Bring `misses` in, as a layer call does: some while the hits are held, the rest one after another."""
        held = {ExpertKey(layer_idx, idx) for idx in hits}
        in_flight: deque[ExpertKey] = deque()
        waiting = deque(misses)
        num_evictions = self._start(layer_idx, waiting, keep, held, in_flight)
        held.difference_update(ExpertKey(layer_idx, idx) for idx in hits)
        while waiting:
            num_evictions += self._start(layer_idx, waiting, keep, held, in_flight)
            assert in_flight, f"{self!r} has no slot to free"
            held.discard(in_flight.popleft())
        return num_evictions

    def _start(
        self, layer_idx: int, waiting: deque[int], keep: set[int], held: set[ExpertKey], in_flight: deque[ExpertKey]
    ) -> int:
        num_evictions = 0
        while waiting and len(in_flight) < MAX_READS_IN_FLIGHT:
            if len(self._cached) >= self._num_slots:
                victim = self.policy.victim(lambda key: key not in held, layer_idx)
                if victim is None:
                    break
                self.policy.removed(victim)
                self._cached.discard(victim)
                num_evictions += 1
            idx = waiting.popleft()
            key = ExpertKey(layer_idx, idx)
            self._cached.add(key)
            self.policy.inserted(key, cold=idx not in keep)
            held.add(key)
            in_flight.append(key)
        return num_evictions
