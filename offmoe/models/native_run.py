"""Consecutive decoder layers of one token by one call of the kernels, while their experts are in RAM.

Each layer is one that native_layer.py computes whole, and its attention has passed its comparison. The call ends before
the experts of a layer that lacks one: these are fetched and computed as always, and the layers after them are the next
call. Whoever watches the layers is told after the call, layer by layer; where somebody must be told before the next
layer begins (a hook on a module within, or a lookahead that is awake), each layer is computed by itself.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from offmoe.executor.joined import JoinedExperts
from offmoe.executor.recovering import RecoveringExecutor
from offmoe.kernels.cpu.mlp import CpuMlp
from offmoe.kernels.cpu.run import CpuTokenRun, RunLayer
from offmoe.models.kv_cache import PreallocatedLayer
from offmoe.models.native import NativeModules
from offmoe.models.native_hooks import Hooks
from offmoe.models.native_layer import LayerStep, step_of
from offmoe.models.native_mlp import MlpStep
from offmoe.models.native_moe import WithShared, alone
from offmoe.models.seam import LayerBinding


def find_runs(native: NativeModules, layers: Sequence[nn.Module]) -> list[LayerRun | nn.Module]:
    """`layers`, those together that can be. What cannot stays as it is."""
    found: list[LayerRun | nn.Module] = []
    joined: list[LayerStep] = []
    for layer in layers:
        step: LayerStep | None = step_of(layer, LayerStep)
        if step is not None and _can_join(step):
            joined.append(step)
            continue
        if joined:
            found.append(LayerRun(native, joined))
        joined = []
        found.append(layer)
    return [*found, LayerRun(native, joined)] if joined else found


def _can_join(step: LayerStep) -> bool:
    """The kernels can make its sum."""
    normed_1D, mlp = step.kernel.normed_1D, _mlp_of(step)
    if step.moe is None:
        return mlp is not None and mlp.takes(normed_1D)
    if step.moe.total is alone:
        return True
    return isinstance(step.moe.total, WithShared) and mlp is not None and mlp.takes(normed_1D)


def _mlp_of(step: LayerStep) -> CpuMlp | None:
    """What is added to the layer's state beside experts that were chosen."""
    total = None if step.moe is None else step.moe.total
    module = step.block if step.moe is None else total.shared if isinstance(total, WithShared) else None
    found: MlpStep | None = None if module is None else step_of(module, MlpStep)
    return None if found is None else found.mlp


@dataclass(frozen=True, slots=True)
class _Made:
    """What a run is as long as nothing is swapped. Of each layer, (1, 1, D): `inputs`, and `states` after attention."""

    version: int
    executor: RecoveringExecutor
    experts: JoinedExperts
    run: CpuTokenRun
    inputs: list[torch.Tensor]
    states: list[torch.Tensor]


class LayerRun:
    """The layers of `steps`, in order. The layers themselves are not touched: who wants one calls it."""

    def __init__(self, native: NativeModules, steps: Sequence[LayerStep]) -> None:
        self._native, self.steps = native, tuple(steps)
        self.layers = [step.layer for step in steps]
        self._bindings = [step.moe.binding for step in steps if step.moe is not None]
        inside = [module for step in steps for module in step.block.modules()]
        told = {id(module) for step in steps if step.moe is not None for module in (step.block, step.moe.gate)}
        own = Hooks((module for module in inside if id(module) not in told), self.layers)
        self._hooks = Hooks.joined([own, *(step.hooks for step in steps)])
        self._experts: list[tuple[LayerBinding, object, dict[str, Any]]] = []
        self._made: _Made | None = None
        self._past: weakref.ref[Any] | None = None

    def forward(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The last layer's output for one token, overwritten by the next call; None, and nothing was done, where each
        layer has to be called by itself. `kwargs` are what every layer would be given.
        """
        made = self._ready()
        past: Any = kwargs.get("past_key_values")
        if made is None or past is None or not self.steps[0].attention.sees_all(hidden, kwargs):
            return None
        rows = [step.attention.own_layer(past) for step in self.steps]
        if None in rows or hidden.dtype != made.run.x_1D.dtype:
            return None
        self._open_rows(made.run, past, rows, *kwargs["position_embeddings"])
        made.run.x_1D.copy_(hidden.view(1, -1))
        return self._run(made).view(hidden.shape)

    def _ready(self) -> _Made | None:
        """What computes the layers now."""
        made = self._made
        if not self._hooks.may_pass:
            return None
        if made is None or made.version != self._native.version or self._has_other_executor(made.executor):
            made = self._made = self._make()
        return made if made is not None and made.experts.is_unwatched else None

    def _has_other_executor(self, executor: RecoveringExecutor) -> bool:
        """Or somebody stands in the experts' place."""
        return any(
            binding.executor is not executor or binding.math is not math or "forward" in experts
            for binding, math, experts in self._experts
        )

    def _make(self) -> _Made | None:
        """None until all is known of every layer."""
        steps = self.steps
        swapped = all(step_of(step.layer, LayerStep) is step and step.attention.is_settled for step in steps)
        executor = self._bindings[0].executor if self._bindings else None
        if not swapped or not isinstance(executor, RecoveringExecutor):
            return None
        experts = executor.joined()
        self._experts = [
            (step.moe.binding, step.moe.binding.math, vars(step.moe.experts)) for step in steps if step.moe is not None
        ]
        if experts is None or self._has_other_executor(executor):
            return None
        if not all(b.math is not None and experts.knows(b.layer_idx, b.math) for b in self._bindings):
            return None  # none of a layer's experts was seen yet, or the kernels do not compute them
        run = CpuTokenRun(self._native.kernels, [_described(step, experts) for step in steps])
        self._past = None
        inputs, states = ([row.view(1, 1, -1) for row in rows] for rows in ((run.x_1D, *run.outputs[:-1]), run.states))
        return _Made(self._native.version, executor, experts, run, inputs, states)

    def _open_rows(self, run: CpuTokenRun, past: Any, rows: list[Any], cos: torch.Tensor, sin: torch.Tensor) -> None:
        """One token more in every layer's cache. Whole caches of full attention are only longer than before."""
        is_known = run.set_angles(cos, sin) and self._past is not None and self._past() is past
        for idx, layer in enumerate(rows):
            if is_known and isinstance(layer, PreallocatedLayer):
                run.num_rows[idx] = layer.count_row()
            else:
                run.set_cache(idx, *layer.open_row())
        self._past = weakref.ref(past)

    def _run(self, made: _Made) -> torch.Tensor:
        begin, end = 0, len(self.steps)
        while begin < end:
            stop = made.executor.guard(partial(self._compute, made, begin))
            if stop < end:  # an expert is missing: as always
                step, state = self.steps[stop], made.states[stop]
                self._tell(made, stop)
                made.run.outputs[stop].copy_(step.finish(state).view(1, -1))
            begin = stop + 1
        return made.run.outputs[-1]

    def _tell(self, made: _Made, idx: int) -> None:
        """Whoever watches the layer's modules, in the order in which they would be called."""
        self._hooks.tell(idx, made.inputs[idx])  # the layers come first in there
        self.steps[idx].tell(made.states[idx])

    def _compute(self, made: _Made, begin: int) -> int:
        """One call, and its books; returns the layer that it ended at."""
        made.experts.refresh()
        began_ns = time.perf_counter_ns()
        stop = made.run(begin)
        for idx in range(begin, stop):
            step = self.steps[idx]
            self._tell(made, idx)
            if step.moe is not None:
                routed_ns, ended_ns = made.run.times_ns(idx)
                made.experts.ran(
                    step.moe.binding.layer_idx, made.run.ids(idx), step.moe.route.weights_1K,
                    began_ns + routed_ns, began_ns + ended_ns,
                )  # fmt: skip
        return stop


def _described(step: LayerStep, experts: JoinedExperts) -> RunLayer:
    """As the kernels want it."""
    moe, half, mlp = step.moe, bool(step.attention.half_angles), _mlp_of(step)
    if moe is None:
        return RunLayer(layer=step.kernel, half_angles=half, mlp=mlp)
    binding = moe.binding
    assert binding.math is not None, f"{binding=}"
    joined = experts.layer(
        binding.layer_idx, binding.math, binding.num_experts, step.kernel.normed_1D, moe.route.weights_1K
    )
    return RunLayer(layer=step.kernel, half_angles=half, experts=joined.experts, table_E=joined.table_E, mlp=mlp)
