"""One MoE layer: look up, decide, fetch what is missing, compute hits while bytes fly, compute arrivals, combine.

Shapes: T tokens, D model width, K experts a token, S = T * K choices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from offmoe.cache.expert_cache import ExpertCache
from offmoe.core.counters import Counters
from offmoe.core.keys import ExpertKey
from offmoe.kernels.reference import ExpertMath, combine_rows
from offmoe.moe.backends import ExpertBackend, ReferenceBackend, TokenRows
from offmoe.moe.cpu_backend import CpuBackend
from offmoe.moe.cpu_experts import CpuExperts
from offmoe.moe.dispatch import dispatch
from offmoe.moe.layer_call import LayerCall
from offmoe.moe.misses import MissPlacer
from offmoe.moe.stalls import StreamStalls
from offmoe.prefetch.ahead import PrefetchCoordinator
from offmoe.trace.recorder import Recorder, flat_ids


class Executor:
    """Runs MoE layers through the expert cache. One call at a time, on the thread that runs the model."""

    def __init__(
        self, cache: ExpertCache, *, rows: ExpertBackend | None = None, ahead: PrefetchCoordinator | None = None,
        tokens: TokenRows | None = None, cpu: CpuExperts | None = None, placer: MissPlacer | None = None,
        recorder: Recorder | None = None,
        over_link: bool = False, stalls: StreamStalls | None = None, follow_stream: Callable[[], None] | None = None,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:  # fmt: skip
        """`tokens`: for single tokens whose experts all have slots; None leaves those to `rows`.
        `stalls`: of a device whose stream waits for copies while the host goes on; None where the host waits.
        `follow_stream`: called before a layer's slots are read (tiers/device.py).
        """
        self.recorder, self.over_link, self.stalls = recorder or Recorder(), over_link, stalls
        self.cache, self.rows, self.ahead = cache, rows or ReferenceBackend(), ahead
        self.cpu, self.placer, self.clock_ns, self._tokens = cpu, placer, clock_ns, tokens
        self._follow_stream = follow_stream
        self._counters: Counters = cache.counters

    def run_layer(
        self, layer_idx: int, math: ExpertMath, num_experts: int,
        x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The experts' weighted sum, (T, D) in x's dtype.

        Each expert is fetched at most once however many tokens chose it. The sum runs over K in the router's order, so
        the result does not depend on which experts were cached or arrived first.
        """
        self._counters.layer_calls += 1
        if self._follow_stream is not None:
            self._follow_stream()
        num_tokens, top_k = expert_ids_TK.shape
        if num_tokens == 1 and isinstance(self.rows, CpuBackend):
            y_1D = self._run_ready(self.rows, layer_idx, math, num_experts, x_TD, expert_ids_TK, weights_TK)
            if y_1D is not None:
                return y_1D
        # Queued before the ids are waited for, so that the wait is for both.
        host_x_TD = self.cpu.take_along(x_TD) if self.cpu is not None else None
        host_ids_TK = self._to_host(expert_ids_TK)
        ids = flat_ids(host_ids_TK.flatten().tolist(), num_experts)
        self.recorder.record(layer_idx, top_k, ids, weights_TK)
        self.cache.begin_layer(layer_idx, ids)
        if num_tokens == 1 and self._tokens is not None and self._tokens.serves(layer_idx):
            y_1D = self._run_hits(self._tokens, layer_idx, ids, num_experts, x_TD, expert_ids_TK, weights_TK)
            if y_1D is not None:
                return y_1D
        assignments = dispatch(host_ids_TK, num_experts, device=x_TD.device)
        y_SD = torch.zeros(num_tokens * top_k, x_TD.shape[-1], dtype=math.dtype, device=x_TD.device)
        LayerCall(self, layer_idx, math, x_TD, y_SD, host_x_TD).run(assignments)
        y_TD = combine_rows(y_SD, weights_TK, x_TD.dtype)
        if self.ahead is not None:
            self.ahead.layer_ended(layer_idx)
        return y_TD

    def _run_ready(
        self, rows: CpuBackend, layer_idx: int, math: ExpertMath, num_experts: int,
        x_1D: torch.Tensor, expert_ids_1K: torch.Tensor, weights_1K: torch.Tensor,
    ) -> torch.Tensor | None:  # fmt: skip
        """One token whose experts are all here, with nobody looking ahead: one call of the kernels, and no holds, since
        nothing is fetched meanwhile. None where that is not so, and then nothing was done.
        """
        ahead, (ids,) = self.ahead, expert_ids_1K.tolist()
        if (ahead is not None and not ahead.is_asleep) or min(ids) < 0 or max(ids) >= num_experts:
            return None
        weights = self.cache.ready([ExpertKey(layer_idx, idx) for idx in ids])
        layer = None if weights is None else rows.layer(layer_idx, math, weights[0])
        if weights is None or layer is None:
            return None
        self.begin_ready(layer_idx, ids, weights_1K)
        begin = self.clock_ns()
        y_1D = rows.token_sum(layer_idx, layer, ids, weights, x_1D, weights_1K)
        self.end_ready(layer_idx, ids, self.clock_ns() - begin)
        return y_1D

    def _run_hits(
        self, tokens: TokenRows, layer_idx: int, ids: Sequence[int], num_experts: int,
        x_1D: torch.Tensor, expert_ids_1K: torch.Tensor, weights_1K: torch.Tensor,
    ) -> torch.Tensor | None:  # fmt: skip
        """One token whose experts are all on the device, as LayerCall, with nothing to sort, wait for or combine.
        None where that is not so, and then nothing was done.
        """
        cache, chosen = self.cache, sorted(set(ids))
        if not chosen or chosen[0] < 0 or chosen[-1] >= num_experts:
            return None
        cache.poll()
        keys = [ExpertKey(layer_idx, idx) for idx in chosen]
        if not all(map(cache.is_ready, keys)):
            return None
        if self.ahead is not None:
            self.ahead.router_spoke(layer_idx, chosen, 1)
        if self.placer is not None:
            self.placer.place(layer_idx, [], [], {})
        self._counters.hits += len(keys)
        held: list[ExpertKey] = []
        try:
            for key in keys:
                cache.use(key, touch=True)
                held.append(key)
            if self.ahead is not None:
                self.ahead.look(layer_idx, is_waiting=False)
            begin = self.clock_ns()
            slot_of = {key.expert_idx: cache.slot_of(key) for key in keys}
            y_1D = tokens.compute(layer_idx, slot_of, x_1D, expert_ids_1K, weights_1K)
            self._counters.compute_ns += self.clock_ns() - begin
        finally:
            cache.release(held)
        if self.ahead is not None:
            self.ahead.layer_ended(layer_idx)
        return y_1D

    def begin_ready(
        self, layer_idx: int, ids: Sequence[int], weights_1K: torch.Tensor, *, now_s: float | None = None
    ) -> None:
        """Books: one token's router chose experts that are all here, and nobody looks ahead. `now_s`: told late, of
        that time.
        """
        if self.ahead is not None:
            self.ahead.router_spoke(layer_idx, ids, 1, now_s=now_s)
        self.recorder.record(layer_idx, len(ids), ids, weights_1K)
        self.cache.begin_layer(layer_idx, ids)

    def end_ready(self, layer_idx: int, ids: Sequence[int], compute_ns: int, *, now_s: float | None = None) -> None:
        """Books: they were computed."""
        self.cache.touch(layer_idx, ids)
        self._counters.hits += len(set(ids))
        self._counters.compute_ns += compute_ns
        if self.ahead is not None:
            self.ahead.layer_ended(layer_idx, now_s=now_s)

    def _to_host(self, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        """The ids on the host; with them, in the same copy and wait, the guesses for layers to come."""
        if expert_ids_TK.device.type == "cpu":
            return expert_ids_TK
        self._counters.syncs += 1
        guesses = self.ahead.pending() if self.ahead is not None else {}
        queued = [expert_ids_TK.flatten(), *(ids_TK.flatten() for ids_TK in guesses.values())]
        flat = (torch.cat(queued) if guesses else queued[0]).cpu()
        self.read_stalls()
        own, *others = torch.split(flat, [expert_ids_TK.numel(), *(ids_TK.numel() for ids_TK in guesses.values())])
        if self.ahead is not None:
            for (layer_idx, ids_TK), host_ids in zip(guesses.items(), others, strict=True):
                self.ahead.take(layer_idx, host_ids.view(ids_TK.shape).tolist())
        return own.view(expert_ids_TK.shape)

    def read_stalls(self) -> None:
        """Book the stalls that the device's stream has told of by now; the host has just waited for it."""
        for stall in self.stalls.measured() if self.stalls is not None else ():
            self._counters.link_stall_ns += stall.link_ns
            if self.ahead is not None:
                self.ahead.stall_measured(stall.stall_ns)

    def recover(self) -> None:
        """After a call was broken off between any two lines: nothing is computed, held or under way any more."""
        if self.cpu is not None:
            self.cpu.restart()
        self.cache.recover()
        self.recorder.forget_guesses()
        if self.stalls is not None:
            self.stalls.forget()
        if self.ahead is not None:
            self.ahead.reset()
