"""The prefetcher, driven through anything in any order; `check_ledger` is for other machines, too."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from prefetch_fakes import EXPERT_BYTES, FakeCache, check_ledger
from virtual_machine import Speeds, VirtualMachine

from offmoe.core.keys import ExpertKey
from offmoe.prefetch.controller import PrefetchController

NUM_LAYERS, NUM_EXPERTS = 3, 6
layers = st.integers(0, NUM_LAYERS - 1)
experts = st.lists(st.integers(0, NUM_EXPERTS - 1), max_size=8)


class PrefetcherMachine(RuleBasedStateMachine):
    """`FakeCache.start_ahead` itself refuses a key that is READY or coming: nothing is started twice."""

    @initialize(
        num_slots=st.integers(2, 10), budget=st.integers(0, 4), chunks=st.sampled_from([1, 4]), whole=st.booleans()
    )
    def make(self, num_slots: int, budget: int, chunks: int, whole: bool) -> None:
        self.machine = VirtualMachine(Speeds(link=EXPERT_BYTES), chunk_bytes=EXPERT_BYTES / chunks)
        self.cache = FakeCache(self.machine, num_slots=num_slots, num_layers=NUM_LAYERS)
        self.whole_layers = whole
        self.budget_bytes = None if whole else budget * EXPERT_BYTES
        self.prefetcher = PrefetchController(self.cache, budget_bytes=budget * EXPERT_BYTES, mode=2)
        self.wanted: dict[int, set[int]] = {}  # what each layer may have started and queued
        self.age: dict[int, int] = {}
        self.is_demand_waiting = False
        self.held: list[ExpertKey] = []

    @rule(layer_idx=layers, ids=experts, distance=st.integers(1, 3))
    def request(self, layer_idx: int, ids: list[int], distance: int) -> None:
        self.prefetcher.request(layer_idx, ids, distance=distance, whole_layer=self.whole_layers)
        self.wanted[layer_idx] = set(ids) if self.whole_layers or distance <= 2 else set()
        self.age[layer_idx] = -distance

    @rule()
    def pump(self) -> None:
        before, share = len(self.cache.log), max(1, self.cache.slots_per_layer)
        spare = max(0, share - self.prefetcher.num_pending)
        self.prefetcher.pump()
        log = self.cache.log[before:]
        started = [key for what, key in log if what == "ahead"]
        assert not (started and self.is_demand_waiting)
        if self.whole_layers:
            assert sum(what == "evict" for what, _ in log) <= spare
        assert all(key.expert_idx in self.wanted.get(key.layer_idx, set()) for key in started)
        for what, key in log:
            if what == "evict":
                assert key.expert_idx not in self.wanted.get(key.layer_idx, set()), f"{key} was wanted"
                assert key not in self.held

    @rule(layer_idx=layers, ids=experts)
    def router_spoke(self, layer_idx: int, ids: list[int]) -> None:
        self.prefetcher.router_spoke(layer_idx, ids)
        self.is_demand_waiting = False
        self.wanted.pop(layer_idx, None)
        for other in list(self.age):
            self.age[other] += 1
            if other == layer_idx or self.age[other] > 2:
                self.wanted.pop(other, None)
                del self.age[other]

    @rule(layer_idx=layers, ids=experts)
    def run_layer(self, layer_idx: int, ids: list[int]) -> None:
        """As the executor: what is needed is held, what is coming is waited for, the rest is fetched."""
        self.router_spoke(layer_idx, ids)
        self.let_go()
        for key in [ExpertKey(layer_idx, expert) for expert in dict.fromkeys(ids)]:
            if self.cache.is_ready(key):
                self.cache.use(key)
            else:
                self.prefetcher.demand_begins()
                coming = self.cache.demand(key)
                if coming is None:  # every slot is held or filling
                    continue
                self.cache.finish(coming)
                self.prefetcher.demand_ends(1000)
                self.is_demand_waiting = False
            self.held.append(key)
        moved = [key for what, key in self.cache.log if what in {"ahead", "demand"}]
        assert len(moved) * EXPERT_BYTES >= self.machine.link.carried_bytes

    @rule()
    def let_go(self) -> None:
        self.cache.release(self.held)
        self.held = []

    @rule()
    def demand_begins(self) -> None:
        self.prefetcher.demand_begins()
        self.is_demand_waiting = True

    @rule()
    def demand_ends(self) -> None:
        self.prefetcher.demand_ends()
        self.is_demand_waiting = False

    @rule(quarters=st.integers(1, 8))
    def time_passes(self, quarters: int) -> None:
        self.machine.advance(quarters / 4)

    @rule(refuse=st.booleans())
    def slots_run_out(self, refuse: bool) -> None:
        self.cache.refuse = refuse

    @rule()
    def interrupt(self) -> None:
        self.cache.recover()
        self.prefetcher.reset()
        self.held, self.is_demand_waiting = [], False
        self.wanted, self.age = {}, {}
        assert self.prefetcher.num_pending == 0

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "prefetcher"):
            check_ledger(self.prefetcher, self.budget_bytes)
            expected = {ExpertKey(layer, expert) for layer, ids in self.wanted.items() for expert in ids}
            assert set(self.prefetcher.wanted) == expected


TestPrefetcher = PrefetcherMachine.TestCase
TestPrefetcher.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_everything_wanted_is_started_dropped_or_spoken_for() -> None:
    """Whatever happens to it, a want is gone once layers enough have run."""
    machine = VirtualMachine(Speeds(link=EXPERT_BYTES))
    cache = FakeCache(machine, num_slots=2, num_layers=8)
    prefetcher = PrefetchController(cache, budget_bytes=EXPERT_BYTES, mode=3)
    for layer_idx in range(2, 8):
        prefetcher.request(layer_idx, range(5), distance=layer_idx % 3 + 1)
    order: Sequence[int] = [0, 1, 0, 1, 0, 1]
    for layer_idx in order:
        prefetcher.router_spoke(layer_idx, [0])
        prefetcher.pump()
        machine.advance(0.5)
    assert not prefetcher.wanted and repr(prefetcher).startswith("<PrefetchController 3 [distance 3 | 0 queued")
