"""Consecutive decoder layers of one token in one call of the library, as long as their experts are in RAM.

All that does not change from token to token is written down once: rows, weights, where each expert lies. Between two
tokens only the caches' numbers of rows and the rotary angles are set, so that a token touches few of Python's objects,
which a layer's weights have driven out of the processor's caches.

Shapes: D model width, E experts, K experts a token, G groups of heads, S rows of a cache, W their width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offmoe.kernels.cpu import structs
from offmoe.kernels.cpu.decode import CpuTokenExperts, set_position
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.layer import CpuTokenLayer
from offmoe.kernels.cpu.mlp import CpuMlp


@dataclass(frozen=True, kw_only=True)
class RunLayer:
    """One layer. Its router's experts, or an MLP, or both, are added to its state. `half_angles`: as of CpuAttention.

    `table_E`: where each expert is described, null where it is not in RAM; the owner keeps it true.
    """

    layer: CpuTokenLayer
    half_angles: bool
    experts: CpuTokenExperts | None = None
    table_E: ctypes.Array[ctypes.c_void_p] | None = None
    mlp: CpuMlp | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """What a layer's descriptions point at."""

    layer: RunLayer
    call: structs.Layer
    state_1D: torch.Tensor
    keep: tuple[object, ...]


class CpuTokenRun:
    """`layers`, one after another. Serves one thread at a time.

    `x_1D` is the first one's input. After a call: `outputs[i]` of each layer, (1, D), `states[i]`, (1, D), before its
    experts, and `ids(i)`. The next call overwrites them. `num_rows[i]`: of a layer's cache, the token's own included.
    """

    def __init__(self, kernels: CpuKernels, layers: Sequence[RunLayer]) -> None:
        """All of one width and type."""
        self._kernels = kernels
        like = layers[0].layer.normed_1D
        rows = [torch.empty_like(like) for _ in range(len(layers) + 1)]
        self.x_1D, self.outputs = rows[0], rows[1:]
        self._steps = (structs.Step * len(layers))()
        self._ids = [_no_ids(layer) for layer in layers]
        self._places = [
            self._place(i, layer, x_1D, y_1D)
            for i, (layer, x_1D, y_1D) in enumerate(zip(layers, rows[:-1], rows[1:], strict=True))
        ]
        self.states = [place.state_1D for place in self._places]
        self.num_rows = (ctypes.c_int64 * len(layers))()
        self._angles = (torch.empty(0), torch.empty(0))
        self._call = structs.Run(
            steps=ctypes.addressof(self._steps), num_rows=ctypes.addressof(self.num_rows), begin=0, end=len(layers)
        )
        self._address = ctypes.addressof(self._call)

    def _place(self, idx: int, layer: RunLayer, x_1D: torch.Tensor, output_1D: torch.Tensor) -> _Place:
        step, state_1D, sum_1D = self._steps[idx], torch.empty_like(x_1D), torch.empty_like(x_1D)
        call, normed_1D = layer.layer.call_between(x_1D, state_1D), layer.layer.normed_1D
        keep: list[object] = [sum_1D]
        if layer.experts is not None:
            assert layer.table_E is not None and layer.layer.router is not None, f"{layer=}"
            route = layer.layer.router[1]
            assert len(layer.table_E) == route.rule.num_experts, f"{route.rule=}"
            chosen_K = (ctypes.c_void_p * route.rule.top_k)()
            experts = layer.experts.call_between(normed_1D, route.weights_1K, sum_1D, chosen_K)
            step.experts, step.table = ctypes.addressof(experts), ctypes.addressof(layer.table_E)
            step.chosen, step.ids = ctypes.addressof(chosen_K), ctypes.addressof(self._ids[idx])
            keep += [chosen_K, experts]
        if layer.mlp is not None:
            mlp_1D = torch.empty_like(x_1D)
            mlp = layer.mlp.call_between(normed_1D, mlp_1D)
            step.mlp = ctypes.addressof(mlp)
            keep += [mlp_1D, mlp]
        assert step.experts or step.mlp, f"{layer=}"
        step.layer, step.output = ctypes.addressof(call), output_1D.data_ptr()
        return _Place(layer, call, state_1D, tuple(keep))

    def __len__(self) -> int:
        return len(self._places)

    def set_angles(self, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Of the token's position, for all layers; as of CpuAttention. False where they are not like those before:
        every layer's cache is then to be set anew.
        """
        mine = self._angles
        is_like = cos.shape == mine[0].shape and sin.shape == mine[1].shape and cos.dtype == mine[0].dtype
        if not is_like:
            mine = self._angles = (torch.empty_like(cos), torch.empty_like(sin))
        mine[0].copy_(cos)
        mine[1].copy_(sin)
        return is_like

    def set_cache(self, idx: int, keys_GSW: torch.Tensor, values_GSW: torch.Tensor) -> None:
        """A layer's rows, the token's own included; as of CpuAttention. After the angles. As long as they only become
        more, and stay where they are, it is enough to set `num_rows`.
        """
        place, (cos, sin) = self._places[idx], self._angles
        set_position(place.call.attend, cos, sin, keys_GSW, values_GSW, half_angles=place.layer.half_angles)
        self.num_rows[idx] = keys_GSW.shape[-2]

    def __call__(self, begin: int) -> int:
        """Computes layers from `begin` on, whose input is in its place (`x_1D`, or the output before). Returns the
        first one whose experts are not all in RAM, of which all up to its router's choice was computed; else how many
        layers there are. Raises MemoryError.
        """
        self._call.begin = begin
        return self._kernels.run_layers(self._address)

    def ids(self, idx: int) -> list[int]:
        """What the layer's router chose."""
        return self._ids[idx][:]

    def times_ns(self, idx: int) -> tuple[int, int]:
        """When the layer's router had chosen, and when it ended, since the call began."""
        step = self._steps[idx]
        return step.routed_ns, step.ended_ns


def _no_ids(layer: RunLayer) -> ctypes.Array[ctypes.c_int32]:
    router = layer.layer.router
    return (ctypes.c_int32 * (0 if router is None else router[1].rule.top_k))()
