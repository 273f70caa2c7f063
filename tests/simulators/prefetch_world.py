"""A made-up model in virtual time: attention, router, fetches, experts; the clock says how long its passes took."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from prefetch_fakes import Coming, FakeCache
from virtual_machine import Speeds, VirtualMachine

from offmoe.core.keys import ExpertKey
from offmoe.prefetch.controller import PrefetchController

CHUNK_BYTES = 500_000


@dataclass(kw_only=True)
class Shape:
    """A made-up model and how it behaves. Seconds are per layer; `stay` is the chance that a token keeps an expert."""

    num_layers: int = 4
    num_experts: int = 32
    top_k: int = 4
    num_slots: int = 48
    attention_s: float = 1e-3
    experts_s: float = 0.5e-3
    link_bytes_per_s: float = 4e9
    accuracy: float = 0.8
    predict_s: float = 0.0
    stay: float = 0.3
    noise: float = 0.0
    num_predicted: int = 0  # 0: top_k
    drift: dict[int, dict[str, float]] = field(default_factory=dict)  # from this pass on, these values


class World:
    """Runs token passes. Two worlds of one seed choose the same experts, whatever is prefetched."""

    def __init__(self, shape: Shape, *, seed: int = 0) -> None:
        self.shape = shape
        self.machine = VirtualMachine(Speeds(link=shape.link_bytes_per_s), chunk_bytes=CHUNK_BYTES)
        self.cache = FakeCache(self.machine, num_slots=shape.num_slots, num_layers=shape.num_layers)
        self._routing, self._guessing, self._noise = (random.Random(seed + idx) for idx in range(3))
        self._last: list[set[int]] = [set() for _ in range(shape.num_layers)]
        self._num_passes = 0

    def run(self, prefetcher: PrefetchController, num_passes: int) -> float:
        """Seconds that `num_passes` token passes took."""
        begin_s = self.machine.now_s
        for _ in range(num_passes):
            for name, value in self.shape.drift.get(self._num_passes, {}).items():
                setattr(self.shape, name, value)
                self.machine.speeds = Speeds(link=self.shape.link_bytes_per_s)
            self._num_passes += 1
            self.run_pass(prefetcher)
        return self.machine.now_s - begin_s

    def run_pass(self, prefetcher: PrefetchController) -> None:
        begin_s = self.machine.now_s
        chosen = [self._choose(layer_idx) for layer_idx in range(self.shape.num_layers)]
        for layer_idx, needed in enumerate(chosen):
            self._attend(prefetcher)
            self._predict(prefetcher, chosen, layer_idx)
            self.run_layer(prefetcher, layer_idx, needed)
        prefetcher.pass_ended(self.machine.now_s - begin_s)

    def _attend(self, prefetcher: PrefetchController) -> None:
        """Attention, with a moment for the prefetcher in the middle of it."""
        noise = self._noise.uniform(-self.shape.noise, self.shape.noise)
        for _ in range(2):
            prefetcher.pump()
            self.machine.advance(self.shape.attention_s * (1 + noise) / 2)

    def _choose(self, layer_idx: int) -> list[int]:
        shape, rng = self.shape, self._routing
        kept = [expert for expert in sorted(self._last[layer_idx]) if rng.random() < shape.stay]
        others = rng.sample([e for e in range(shape.num_experts) if e not in kept], shape.top_k - len(kept))
        self._last[layer_idx] = {*kept, *others}
        return kept + others

    def _predict(self, prefetcher: PrefetchController, chosen: list[list[int]], layer_idx: int) -> None:
        """Name the next layers' experts, each rightly with the chance `accuracy`."""
        shape = self.shape
        for distance in (1, 2):
            target = layer_idx + distance
            if target >= shape.num_layers or not prefetcher.is_on(distance):
                continue
            guesses = list(chosen[target]) + [-1] * max(0, shape.num_predicted - shape.top_k)
            named = [
                guess if guess >= 0 and self._guessing.random() < shape.accuracy
                else self._guessing.randrange(shape.num_experts)
                for guess in guesses
            ]  # fmt: skip
            self.machine.advance(shape.predict_s)
            prefetcher.request(target, named, distance=distance)

    def run_layer(
        self, prefetcher: PrefetchController, layer_idx: int, needed: list[int], *, cold: bool = False
    ) -> None:
        """As the executor does: hits are held, misses started, hits computed, arrivals waited for."""
        cache, machine = self.cache, self.machine
        keys = [ExpertKey(layer_idx, expert) for expert in needed]
        cache.poll()
        prefetcher.router_spoke(layer_idx, needed)
        hits = [key for key in keys if cache.is_ready(key)]
        for key in hits:
            cache.use(key, touch=not cold)
        missing = [key for key in keys if key not in hits]
        late = {key for key in missing if cache.is_coming(key)}
        held, stall_s = list(hits), 0.0
        if missing:
            prefetcher.demand_begins()
        expert_s = self.shape.experts_s / len(keys)
        fetches = self._start(missing, cold=cold)
        machine.advance(expert_s * len(hits))
        while fetches:
            before_s = machine.now_s
            coming = fetches.pop(0)
            cache.finish(coming)
            held.append(coming.key)
            stall_s += machine.now_s - before_s
            machine.advance(expert_s)
            if cold:
                cache.release(held)
                held = []
            fetches += self._start(missing, cold=cold)
        if hits or late or held:
            cache.release(held)
        prefetcher.demand_ends(int(stall_s * 1e9))
        prefetcher.pump()

    def _start(self, missing: list[ExpertKey], *, cold: bool) -> list[Coming]:
        started = []
        while missing and (coming := self.cache.demand(missing[0], cold=cold)) is not None:
            started.append(coming)
            missing.pop(0)
        return started
