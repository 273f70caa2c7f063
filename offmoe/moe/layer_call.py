"""One call of a MoE layer: look up, place, fetch, compute hits, wait, compute arrivals."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from offmoe.cache.expert_cache import ExpertCache
from offmoe.cache.fetch import Fetch
from offmoe.cache.keeping import MAX_READS_IN_FLIGHT, experts_to_keep
from offmoe.core.keys import ExpertKey
from offmoe.formats.dense import ExpertWeights
from offmoe.kernels.reference import ExpertMath
from offmoe.moe.backends import Computed, ExpertBackend
from offmoe.moe.cpu_experts import CpuExperts, CpuJob
from offmoe.moe.dispatch import Assignment, num_rows
from offmoe.moe.misses import MissPlacer
from offmoe.moe.stalls import StreamStalls
from offmoe.prefetch.ahead import PrefetchCoordinator


class LayerParts(Protocol):
    """The parts of an executor that a layer call works with."""

    cache: ExpertCache
    rows: ExpertBackend
    ahead: PrefetchCoordinator | None
    cpu: CpuExperts | None
    placer: MissPlacer | None
    stalls: StreamStalls | None
    over_link: bool
    clock_ns: Callable[[], int]


class LayerCall:
    """The state of one layer call. Whatever happens in it, no hold and no unfinished fetch is left behind."""

    def __init__(
        self, executor: LayerParts, layer_idx: int, math: ExpertMath, x_TD: torch.Tensor, y_SD: torch.Tensor,
        host_x_TD: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self._executor, self._cache, self._counters = executor, executor.cache, executor.cache.counters
        self._layer_idx, self._math = layer_idx, math
        self._x_TD, self._y_SD, self._host_x_TD = x_TD, y_SD, host_x_TD
        self._in_flight: deque[tuple[Fetch, list[Assignment]]] = deque()
        self._held: list[ExpertKey] = []
        self._ahead = executor.ahead
        self._job: CpuJob | None = None
        self._on_cpu: list[ExpertKey] = []
        self._stall_ns = 0
        self._disk_stall_ns = self._counters.disk_stall_ns

    def run(self, assignments: list[Assignment]) -> None:
        """Fetch what is missing, compute all rows, and keep the books."""
        by_expert: dict[int, list[Assignment]] = {}
        for assignment in assignments:
            by_expert.setdefault(assignment.expert_idx, []).append(assignment)
        rows_by_expert = {idx: num_rows(assigned) for idx, assigned in by_expert.items()}
        keep = experts_to_keep(rows_by_expert, self._cache.slots_per_layer)
        hits, late, missing = self._look_up(by_expert)
        try:
            ready = [self._use(idx, by_expert[idx], touch=idx in keep) for idx in hits]
            late, missing = self._send_to_cpu(late, missing, by_expert)
            self._claim(late, by_expert, keep)
            self._start_fetches(missing, by_expert, keep)
            if self._ahead is not None:
                self._ahead.look(self._layer_idx, is_waiting=bool(self._in_flight))
            self._compute(ready)
            self._release()
            while self._in_flight or missing:
                self._start_fetches(missing, by_expert, keep)
                if not self._in_flight:
                    self._make_room()
                    self._start_fetches(missing, by_expert, keep)
                assert self._in_flight, f"{self._cache!r} has no slot to free, and nothing is under way"
                self._compute_arrivals(is_last=not missing)
                self._release_in_turn(missing, by_expert, keep)
            self._collect()
        finally:
            self._release()
            self._cache.abandon(fetch for fetch, _ in self._in_flight)
            if self._job is not None:
                self._job.close()
        if self._job is not None and self._executor.placer is not None:
            self._executor.placer.served(self._on_cpu)

    def _look_up(self, by_expert: dict[int, list[Assignment]]) -> tuple[list[int], list[int], deque[int]]:
        """Which experts are here, which are on their way, and which are neither. Tells whoever fetches ahead."""
        cache, layer_idx = self._cache, self._layer_idx
        keys = {idx: ExpertKey(layer_idx, idx) for idx in by_expert}
        cache.poll()
        if self._ahead is not None:
            self._ahead.router_spoke(layer_idx, list(by_expert), self._x_TD.shape[0])
        hits = [idx for idx, key in keys.items() if cache.is_ready(key)]
        late = [idx for idx, key in keys.items() if cache.is_coming(key)]
        missing = deque(idx for idx in by_expert if idx not in hits and idx not in late)
        self._counters.hits += len(hits)
        self._counters.late_hits += len(late)
        self._counters.misses += len(missing)
        self._counters.waiting_calls += bool(late or missing)
        return hits, late, missing

    def _use(self, idx: int, assigned: list[Assignment], *, touch: bool) -> Computed:
        key = ExpertKey(self._layer_idx, idx)
        weights = self._cache.use(key, touch=touch)
        self._held.append(key)
        return Computed(self._cache.slot_of(key), weights, assigned)

    def _claim(self, late: list[int], by_expert: dict[int, list[Assignment]], keep: set[int]) -> None:
        """Claim what is on its way, for this call to wait for."""
        for idx in late:
            fetch = self._cache.start(ExpertKey(self._layer_idx, idx), cold=idx not in keep)
            assert fetch is not None, f"{idx=} was on its way"
            self._in_flight.append((fetch, by_expert[idx]))

    def _send_to_cpu(
        self, late: list[int], missing: deque[int], by_expert: dict[int, list[Assignment]]
    ) -> tuple[list[int], deque[int]]:
        """Hand what is better computed in RAM over to the CPU; returns what is to be waited for and fetched."""
        cpu, placer = self._executor.cpu, self._executor.placer
        if cpu is None or placer is None:
            return late, missing
        late_keys, keys = ([ExpertKey(self._layer_idx, idx) for idx in group] for group in (late, missing))
        rows = {key: num_rows(by_expert[key.expert_idx]) for key in (*late_keys, *keys)}
        chosen = placer.place(self._layer_idx, late_keys, keys, rows)
        if not chosen:
            return late, missing
        self._on_cpu = [key for key in (*late_keys, *keys) if key in chosen]
        self._counters.cpu_experts += len(self._on_cpu)
        assigned = {key: by_expert[key.expert_idx] for key in self._on_cpu}
        x_TD = self._x_TD if self._host_x_TD is None else self._host_x_TD
        self._job = cpu.start(self._layer_idx, self._math, assigned, x_TD)
        return (
            [key.expert_idx for key in late_keys if key not in chosen],
            deque(key.expert_idx for key in keys if key not in chosen),
        )

    def _start_fetches(self, missing: deque[int], by_expert: dict[int, list[Assignment]], keep: set[int]) -> None:
        while missing and len(self._in_flight) < MAX_READS_IN_FLIGHT:
            fetch = self._cache.start(ExpertKey(self._layer_idx, missing[0]), cold=missing[0] not in keep)
            if fetch is None:  # every slot is held or filling: the next arrivals free some
                return
            self._in_flight.append((fetch, by_expert[missing.popleft()]))

    def _make_room(self) -> None:
        """Every slot, here or below, is taken by what was fetched ahead or is computed in RAM: wait for that."""
        self._collect()
        self._cache.settle()

    def _collect(self) -> None:
        """Wait for what is computed in RAM; the waits for the disk in it are none of the link's."""
        if self._job is not None:
            stall_ns = self._job.collect(self._y_SD)
            self._counters.disk_stall_ns += stall_ns
            self._disk_stall_ns += stall_ns

    def _compute_arrivals(self, *, is_last: bool) -> None:
        """Wait for the oldest fetch, then compute it with whatever else has arrived by now."""
        arrived: list[Computed] = []
        begin = self._executor.clock_ns()
        while self._in_flight and (not arrived or self._in_flight[0][0].ticket.done()):
            fetch, assignments = self._in_flight.popleft()
            arrived.append(Computed(fetch.slot, self._finish(fetch), assignments))
            self._held.append(fetch.key)
        self._stall_ns += self._executor.clock_ns() - begin
        if is_last and not self._in_flight:
            self._count_stall()
            if self._ahead is not None:
                self._ahead.demand_ends(0 if self._executor.stalls is not None else self._stall_ns)
                self._ahead.pump()
        self._compute(arrived)

    def _finish(self, fetch: Fetch) -> ExpertWeights:
        stalls = self._executor.stalls
        if stalls is None or fetch.ticket.done():
            return self._cache.finish(fetch)
        return stalls.wait(self._layer_idx, partial(self._cache.finish, fetch))

    def _count_stall(self) -> None:
        """Over a link, what was waited for the disk is counted already, by who waited."""
        from_disk_ns = self._counters.disk_stall_ns - self._disk_stall_ns
        if self._executor.stalls is not None:
            self._executor.stalls.layer_waited(disk_ns=from_disk_ns)
        elif self._executor.over_link:
            self._counters.link_stall_ns += max(0, self._stall_ns - from_disk_ns)
        else:
            self._counters.disk_stall_ns += self._stall_ns

    def _compute(self, experts: list[Computed]) -> None:
        """y of the experts' rows."""
        begin = self._executor.clock_ns()
        if experts:
            self._executor.rows.compute(self._layer_idx, self._math, experts, self._x_TD, self._y_SD)
        self._counters.compute_ns += self._executor.clock_ns() - begin

    def _release_in_turn(self, missing: deque[int], by_expert: dict[int, list[Assignment]], keep: set[int]) -> None:
        """The arrivals go one by one, and each lets the next fetch begin: who is evicted does not depend on how many
        arrived together, so that replays can tell it (cache/shadow.py).
        """
        while self._held and missing:
            self._cache.release([self._held.pop(0)])
            self._start_fetches(missing, by_expert, keep)
        self._release()

    def _release(self) -> None:
        held, self._held = self._held, []
        self._cache.release(held)
