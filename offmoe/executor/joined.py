"""The experts of several MoE layers for one call of the kernels: where each lies, and the books afterwards.

The kernels look experts up in tables of addresses, one a layer. A table is put right before a call from what came and
went in the cache since the call before (`Contents.changes`). During the call nothing comes or goes: only the thread
that runs the model changes the cache, and it is in the call. Afterwards the books are told of every layer, in order and
with the same numbers as when each layer had been computed by itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from offmoe.base.keys import ExpertKey
from offmoe.executor.cpu_rows import CpuRows
from offmoe.executor.executor import Executor
from offmoe.kernels.cpu.decode import CpuTokenExperts
from offmoe.kernels.cpu.kernels import CpuLayer, DescribedExpert
from offmoe.kernels.reference import ExpertMath


@dataclass(frozen=True, slots=True)
class JoinedLayer:
    """One MoE layer. `table_E`: the address of each expert's description, null where it is not in RAM."""

    layer_idx: int
    experts: CpuTokenExperts
    table_E: ctypes.Array[ctypes.c_void_p]
    described: list[DescribedExpert | None]


class JoinedExperts:
    """MoE layers of `executor`, whose rows the kernels compute in RAM."""

    def __init__(self, executor: Executor, rows: CpuRows) -> None:
        self._executor, self._rows = executor, rows
        self._layers: dict[int, JoinedLayer] = {}
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
    ) -> JoinedLayer:
        """The layer whose experts are given such a row and such weights. Some of its experts were seen, and the kernels
        compute them: `knows` said True.
        """
        kernels_layer = self._rows.seen(layer_idx, math)
        assert kernels_layer is not None, f"{layer_idx=}"
        experts = CpuTokenExperts(self._rows.kernels, kernels_layer, weights_1K.numel(), x_1D, weights_1K)
        joined = JoinedLayer(layer_idx, experts, (ctypes.c_void_p * num_experts)(), [None] * num_experts)
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

    def _put_right(self, joined: JoinedLayer, experts: Iterable[int]) -> None:
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
