"""The executor of a loaded engine: a layer at a time, or the books of several that one call of the kernels computes.

Ctrl-C may come between any two lines; the cache's books are put in order before anybody looks at them again. `Executor`
ends every call without a hold or an unfinished read, also when a read fails. An exception that a signal raises inside
the bookkeeping itself is beyond that: a slot may be off the free list and in no map.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from offmoe.core.errors import OffmoeError
from offmoe.core.forks import forked_error
from offmoe.core.keys import ExpertKey
from offmoe.kernels.cpu.decode import CpuTokenExperts
from offmoe.kernels.cpu.kernels import CpuLayer, DescribedExpert
from offmoe.kernels.reference import ExpertMath
from offmoe.moe.cpu_backend import CpuBackend
from offmoe.moe.executor import Executor

Result = TypeVar("Result")

_COUNTED_ONCE = ("hits", "late_hits", "misses", "layer_calls", "waiting_calls")


class InterruptSafeExecutor:
    """Runs layers as `executor` does. After a call was broken off, the cache is at rest and keeps what is whole."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._in_call = False
        self._pid = os.getpid()

    def run_layer(
        self, layer_idx: int, math: ExpertMath, num_experts: int,
        x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The experts' weighted sum, (T, D) in x's dtype."""
        return self.guard(
            partial(self._executor.run_layer, layer_idx, math, num_experts, x_TD, expert_ids_TK, weights_TK)
        )

    def joined(self) -> FusedExperts | None:
        """Its experts for calls that compute several layers, made within `guard`; None where rows are not the CPU
        kernels'.
        """
        rows = self._executor.rows
        return FusedExperts(self._executor, rows) if isinstance(rows, CpuBackend) else None

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Context for a token that is computed a second time: the routers' choices are not recorded or counted; what is
        read is.
        """
        recorder, counters = self._executor.recorder, self._executor.cache.counters
        before = counters.copy()
        recorder.is_paused = True
        try:
            yield
        finally:
            recorder.is_paused = False
            for name in _COUNTED_ONCE:
                setattr(counters, name, getattr(before, name))

    def guard(self, call: Callable[[], Result]) -> Result:
        """Run `call`, which uses the executor, and return its result. Raises EngineBusyError in a forked child."""
        if os.getpid() != self._pid:
            raise forked_error(self._pid)
        if self._in_call:  # a second Ctrl-C broke off the recovery of the call before
            self._executor.recover()
        self._in_call = True
        try:
            result = call()
        except OffmoeError:  # a read that failed: the executor has cleaned up
            self._in_call = False
            raise
        except BaseException:
            self._executor.recover()
            self._in_call = False
            raise
        self._in_call = False
        return result


@dataclass(frozen=True, slots=True)
class FusedExpertsLayer:
    """One MoE layer. `table_E`: the address of each expert's description, null where it is not in RAM."""

    layer_idx: int
    experts: CpuTokenExperts
    table_E: ctypes.Array[ctypes.c_void_p]
    described: list[DescribedExpert | None]


class FusedExperts:
    """The experts of several MoE layers for one call of the kernels: where each lies, and the books afterwards.

    The kernels look experts up in tables of addresses, one a layer. A table is put right before a call from what came
    and went in the cache since the call before (`Contents.changes`). During the call nothing comes or goes: only the
    thread that runs the model changes the cache, and it is in the call. Afterwards the books are told of every layer,
    in order and with the same numbers as when each layer had been computed by itself.
    """

    def __init__(self, executor: Executor, rows: CpuBackend) -> None:
        """`rows`: by the kernels, in RAM."""
        self._executor, self._rows = executor, rows
        self._layers: dict[int, FusedExpertsLayer] = {}
        self._contents = executor.cache.contents

    @property
    def is_unwatched(self) -> bool:
        """Nobody looks ahead now, who would have to be told before the next layer."""
        ahead = self._executor.ahead
        return ahead is None or ahead.is_asleep

    def knows(self, layer_idx: int, math: ExpertMath) -> bool:
        """`layer` would return one."""
        return self._rows.seen(layer_idx, math) is not None

    def layer(
        self, layer_idx: int, math: ExpertMath, num_experts: int, x_1D: torch.Tensor, weights_1K: torch.Tensor
    ) -> FusedExpertsLayer:
        """The layer whose experts are given such a row and such weights. Some of its experts were seen, and the kernels
        compute them: `knows` said True.
        """
        kernels_layer = self._rows.seen(layer_idx, math)
        assert kernels_layer is not None, f"{layer_idx=}"
        experts = CpuTokenExperts(self._rows.kernels, kernels_layer, weights_1K.numel(), x_1D, weights_1K)
        joined = FusedExpertsLayer(layer_idx, experts, (ctypes.c_void_p * num_experts)(), [None] * num_experts)
        self._layers[layer_idx] = joined
        self._put_right(joined, range(num_experts))
        return joined

    def refresh(self) -> None:
        """Put the tables right. Before every call."""
        if not self._contents.changes:
            return
        for key in self._contents.take_changes():
            joined = self._layers.get(key.layer_idx)
            if joined is not None:
                self._put_right(joined, (key.expert_idx,))

    def _put_right(self, joined: FusedExpertsLayer, experts: Iterable[int]) -> None:
        layer: CpuLayer = joined.experts.layer
        for expert_idx in experts:
            weights = self._contents.find(ExpertKey(joined.layer_idx, expert_idx))
            found = None if weights is None else layer.describe(expert_idx, weights)
            joined.described[expert_idx] = found
            joined.table_E[expert_idx] = None if found is None else found.address

    def ran(self, layer_idx: int, ids: Sequence[int], weights_1K: torch.Tensor, began_ns: int, ended_ns: int) -> None:
        """The layer was computed with these experts, from its router's choice to its end by `time.perf_counter_ns`."""
        executor = self._executor
        executor.cache.counters.layer_calls += 1
        executor.begin_ready(layer_idx, ids, weights_1K, now_s=began_ns / 1e9)
        executor.end_ready(layer_idx, ids, ended_ns - began_ns, now_s=ended_ns / 1e9)
