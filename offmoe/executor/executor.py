"""One MoE layer: look up, fetch what is missing, compute hits while bytes fly, compute arrivals, combine.

Shapes: T tokens, D model width, K experts a token, S = T * K choices.
"""

from __future__ import annotations

import time
from collections import deque

import torch

from offmoe.base.counters import Counters
from offmoe.base.keys import ExpertKey
from offmoe.cache.expert_cache import ExpertCache, Fetch
from offmoe.executor.dispatch import Assignment, dispatch
from offmoe.formats.dense import ExpertWeights
from offmoe.kernels.reference import ExpertMath, experts_forward, one_token_forward

# Reads in flight at once: enough to keep a drive busy; more only lengthens the wait for the first.
MAX_READS_IN_FLIGHT = 8
# Rows per fp32 block of the final weighted sum, so that a long prefill needs no (S, D) fp32 tensor.
COMBINE_ROWS = 256


class Executor:
    """Runs MoE layers through the expert cache. One call at a time, on the thread that runs the model."""

    def __init__(self, cache: ExpertCache) -> None:
        self._cache = cache
        self._counters: Counters = cache.counters

    def run_layer(
        self, layer_idx: int, math: ExpertMath, num_experts: int,
        x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The experts' weighted sum, (T, D) in x's dtype.

        Each expert is read at most once however many tokens chose it. The sum runs over K in the router's order, so
        the result does not depend on which experts were cached or arrived first.
        """
        self._counters.layer_calls += 1
        num_tokens, top_k = expert_ids_TK.shape
        assignments = dispatch(expert_ids_TK, num_experts)
        y_SD = torch.zeros(num_tokens * top_k, x_TD.shape[-1], dtype=math.dtype, device=x_TD.device)
        _LayerRun(self._cache, layer_idx, math, x_TD, y_SD).run(assignments)
        return combine(y_SD, weights_TK, x_TD.dtype)


class _LayerRun:
    """The state of one layer call. Whatever happens in it, no hold and no unfinished read is left behind."""

    def __init__(
        self, cache: ExpertCache, layer_idx: int, math: ExpertMath, x_TD: torch.Tensor, y_SD: torch.Tensor
    ) -> None:
        self._cache, self._counters = cache, cache.counters
        self._layer_idx, self._math = layer_idx, math
        self._x_TD, self._y_SD = x_TD, y_SD
        self._in_flight: deque[tuple[Fetch, list[Assignment]]] = deque()

    def run(self, assignments: list[Assignment]) -> None:
        by_expert: dict[int, list[Assignment]] = {}
        for assignment in assignments:
            by_expert.setdefault(assignment.expert_idx, []).append(assignment)
        keep = self._experts_to_keep(by_expert)
        hits = [idx for idx in by_expert if self._cache.has(ExpertKey(self._layer_idx, idx))]
        missing = deque(idx for idx in by_expert if not self._cache.has(ExpertKey(self._layer_idx, idx)))
        self._counters.hits += len(hits)
        self._counters.misses += len(missing)
        held: list[ExpertKey] = []
        try:
            ready = []
            for idx in hits:
                key = ExpertKey(self._layer_idx, idx)
                ready.append((self._cache.use(key, touch=idx in keep), by_expert[idx]))
                held.append(key)
            self._start_reads(missing, by_expert, keep)
            self._compute(ready)
            self._release(held)
            while self._in_flight or missing:
                self._start_reads(missing, by_expert, keep)
                assert self._in_flight, f"{self._cache!r} has no slot to free, and nothing is under way"
                self._compute_arrivals(held)
        finally:
            self._release(held)
            self._cache.abandon(fetch for fetch, _ in self._in_flight)

    def _experts_to_keep(self, by_expert: dict[int, list[Assignment]]) -> set[int]:
        """A call that touches more than the layer's share of slots (prefill) keeps only the busiest experts.

        The others serve this call and go first, so that one long prompt neither fills the cache with one layer nor
        drives out what decoding uses.
        """
        share = max(1, self._cache.slots_per_layer)
        if len(by_expert) <= share:
            return set(by_expert)
        rows = {idx: sum(a.num_rows for a in assigned) for idx, assigned in by_expert.items()}
        if max(rows.values()) == 1:  # one token: all its experts are equally recent
            return set(by_expert)
        return set(sorted(rows, key=lambda idx: (-rows[idx], idx))[:share])

    def _start_reads(self, missing: deque[int], by_expert: dict[int, list[Assignment]], keep: set[int]) -> None:
        while missing and len(self._in_flight) < MAX_READS_IN_FLIGHT:
            fetch = self._cache.start(ExpertKey(self._layer_idx, missing[0]), cold=missing[0] not in keep)
            if fetch is None:  # every slot is held or filling: the next arrivals free some
                return
            self._in_flight.append((fetch, by_expert[missing.popleft()]))

    def _compute_arrivals(self, held: list[ExpertKey]) -> None:
        """Wait for the oldest read, then compute it with whatever else has arrived by now."""
        arrived: list[tuple[ExpertWeights, list[Assignment]]] = []
        begin = time.perf_counter_ns()
        while self._in_flight and (not arrived or self._in_flight[0][0].ticket.done()):
            fetch, assignments = self._in_flight.popleft()
            arrived.append((self._cache.finish(fetch), assignments))
            held.append(fetch.key)
        self._counters.disk_stall_ns += time.perf_counter_ns() - begin
        self._compute(arrived)
        self._release(held)

    def _release(self, held: list[ExpertKey]) -> None:
        while held:
            self._cache.release(held.pop())

    def _compute(self, experts: list[tuple[ExpertWeights, list[Assignment]]]) -> None:
        """y of the experts' rows. One row each (decode): one group. Many rows: expert by expert, to bound memory."""
        begin = time.perf_counter_ns()
        flat = [(weights, assignment) for weights, assigned in experts for assignment in assigned]
        if flat and all(assignment.tokens_N is None for _, assignment in flat):
            y_KD = one_token_forward(self._math, [(a.expert_idx, weights) for weights, a in flat], self._x_TD)
            for row, (_, assignment) in enumerate(flat):
                self._y_SD[assignment.choices_N] = y_KD[row]
        else:
            for weights, assignment in flat:
                x_ND = self._x_TD if assignment.tokens_N is None else self._x_TD[assignment.tokens_N]
                self._y_SD[assignment.choices_N] = experts_forward(self._math, [(assignment.expert_idx, weights, x_ND)])
        self._counters.compute_ns += time.perf_counter_ns() - begin


def combine(y_SD: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of every token's K rows, weighted; as transformers' grouped path does it. (S, D), (T, K) -> (T, D)."""
    num_tokens, top_k = weights_TK.shape
    y_TKD = y_SD.view(num_tokens, top_k, -1)
    blocks = [
        (y_TKD[begin : begin + COMBINE_ROWS] * weights_TK[begin : begin + COMBINE_ROWS, :, None]).sum(dim=1).to(dtype)
        for begin in range(0, num_tokens, COMBINE_ROWS)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
