"""Steps of a program for the decoder layers of a model, written from a spec and the weights that `weights.py` reads.

Shapes: D model width, E experts, K experts a token, H heads, W head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from offmoe.decode.spec import Attention, DecoderSpec, DeltaNet, Heads, Latents, Moe, NoSpecError, part_of
from offmoe.decode.weights import WeightReader
from offmoe.executor.joined import JoinedExperts
from offmoe.kernels.cpu.decode import set_position
from offmoe.kernels.cpu.delta import DeltaInput, DeltaShape, set_states
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.layer import CpuRoute, CpuTokenLayer
from offmoe.kernels.cpu.program import CpuProgram
from offmoe.models.kv_cache import Buffers
from offmoe.models.seam import LayerBinding, find_binding

_EPS = ("variance_epsilon", "eps", "epsilon")
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
Angles = tuple[torch.Tensor, torch.Tensor]
# Tells a layer's attention of the token's angles and of all rows of its cache, itself the last.
Place = Callable[[Angles, Buffers], None]


@dataclass(kw_only=True)
class FusedMoe:
    """The experts of one layer. `step`: its number in the program, where a call ends if an expert is missing. `y` is
    then to be written.
    """

    binding: LayerBinding
    route: CpuRoute
    ids_K: ctypes.Array[ctypes.c_int64]
    step: int
    x: torch.Tensor
    y: torch.Tensor


@dataclass(kw_only=True)
class FusedLayer:
    """One decoder layer. `begin`: its first step.

    `input`, `state`, `normed`: its rows, (1, D): before and after attention, and what the block is given. `has_rows`:
    its cache has keys and values, not running states. `seen_by`: modules, by the row that is their input.
    """

    module: nn.Module
    layer_idx: int
    begin: int
    input: torch.Tensor
    state: torch.Tensor
    normed: torch.Tensor
    place: Place
    has_rows: bool
    moe: FusedMoe | None = None
    seen_by: list[tuple[nn.Module, torch.Tensor]] = field(default_factory=list)


class LayerWriter:
    """Appends decoder layers to a program."""

    def __init__(
        self, program: CpuProgram, kernels: CpuKernels, read: WeightReader, spec: DecoderSpec, experts: JoinedExperts,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self._program, self._spec, self._experts, self._dtype = program, spec, experts, dtype
        self._kernels, self._read = kernels, read
        self._scratch: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}

    def write(self, module: nn.Module, layer_idx: int, x: torch.Tensor, output: torch.Tensor) -> FusedLayer:
        """The layer between two rows. Raises NoSpecError."""
        program, spec = self._program, self._spec
        begin, attention = len(program), spec.attention_of(layer_idx)
        block = part_of(module, spec.moe.name)
        is_moe = part_of(block, spec.moe.experts) is not None
        route = self._read.route(block, spec.moe.router) if is_moe else None
        after = part_of(module, spec.norms[2]) if spec.norms[2] else None
        state = program.row(x.numel(), self._dtype)
        if self._is_common(attention):
            assert isinstance(attention, Heads)
            layer = CpuTokenLayer(
                self._kernels, self._read.heads(module, attention),
                (self._read.norm(module, spec.norms[0]), self._read.norm(module, spec.norms[2])),
                [self._read.linear(module, f"{attention.name}.{name}") for name in attention.projections], route,
            )  # fmt: skip
            place = _place_heads(program.layer(layer, layer_idx, x, state), attention)
            normed = layer.normed_1D
        else:
            attended, place = self._attend(module, layer_idx, attention, x)
            program.numbers("sum", x, attended, state, scale=spec.residual)
            normed = state
            if after is not None:
                normed = program.row(x.numel(), self._dtype)
                program.norm(self._read.norm(module, spec.norms[2]), state, normed)
            if route is not None:
                logits = self._row("logits", route[0].num_outputs, route[1].logits_dtype)
                program.linear(route[0], normed, logits)
                program.choose(route[1], logits)
        written = FusedLayer(
            module=module, layer_idx=layer_idx, begin=begin, input=x, state=state, normed=normed, place=place,
            has_rows=not isinstance(attention, DeltaNet),
        )  # fmt: skip
        written.seen_by = [(module, x), *([] if after is None else [(after, state)]), (block, normed)]
        if route is None:
            added = self._row("added", x.numel())
            program.mlp(self._read.mlp(block), normed, added)
        else:
            written.moe, added = self._moe(block, spec.moe, route[1], normed)
            gate = part_of(block, spec.moe.router.weight.rpartition(".")[0])
            written.seen_by.append((gate, normed))
        if spec.norms[3]:
            program.norm(self._read.norm(module, spec.norms[3]), added, added)
        program.numbers("sum", state, added, output, scale=spec.residual)
        return written

    def _is_common(self, attention: Attention) -> bool:
        """One job of the kernels computes it up to the router's choice."""
        spec = self._spec
        return (
            isinstance(attention, Heads) and not attention.gated and attention.clip is None
            and all(bool(name) == wanted for name, wanted in zip(spec.norms, (True, False, True, False), strict=True))
            and spec.residual == 1.0
        )  # fmt: skip

    def _attend(
        self, module: nn.Module, layer_idx: int, attention: Attention, x: torch.Tensor
    ) -> tuple[torch.Tensor, Place]:
        """Append attention. Returns the row that it adds to x, and the function that tells it of the token's place."""
        program, width = self._program, x.numel()
        given = x
        if self._spec.norms[0]:
            given = self._row("given", width)
            program.norm(self._read.norm(module, self._spec.norms[0]), x, given)
        if isinstance(attention, DeltaNet):
            heads, place = self._delta_net(module, attention, given)
            name = f"{attention.name}.out_proj"
        elif isinstance(attention, Latents):
            heads, place = self._latents(module, layer_idx, attention, given)
            name = f"{attention.name}.o_proj"
        else:
            heads, place = self._grouped(module, layer_idx, attention, given)
            name = f"{attention.name}.{attention.projections[3]}"
        attended = self._row("attended", width)
        program.linear(self._read.linear(module, name), heads, attended)
        if self._spec.norms[1]:
            program.norm(self._read.norm(module, self._spec.norms[1]), attended, attended)
        return attended, place

    def _grouped(
        self, module: nn.Module, layer_idx: int, attention: Heads, x: torch.Tensor
    ) -> tuple[torch.Tensor, Place]:
        program, inner = self._program, part_of(module, attention.name)
        norms = attention.norms or ()
        if attention.clip is not None:  # after the norms, which are steps of their own then
            attention = replace(attention, norms=None)
        kernel = self._read.heads(module, attention)
        rows = []
        for name in attention.projections[:3]:
            rows.append(self._projected(inner, name, x))
        if attention.clip is not None:
            for name, row in zip(norms, rows, strict=False):
                program.norm(self._read.norm(inner, name), row, row)
            for row in rows:
                program.numbers("clamp", row, None, row, scale=attention.clip)
        width = kernel.shape.width
        heads = self._row("heads", kernel.shape.num_heads * kernel.shape.value_width)
        query, gate = rows[0], None
        if attention.gated:  # each head's query, and behind it its gate
            query, gate = (self._row(name, rows[0].numel() // 2) for name in ("query", "gate"))
            program.copy(rows[0], 0, 2 * width, query, width)
            program.copy(rows[0], width, 2 * width, gate, width)
        call = program.attend(kernel, layer_idx, (query, rows[1], rows[2]), heads)
        if gate is not None:
            program.numbers("gate", heads, gate, heads)
        return heads, _place_heads(call, attention)

    def _delta_net(self, module: nn.Module, attention: DeltaNet, x: torch.Tensor) -> tuple[torch.Tensor, Place]:
        program, inner = self._program, part_of(module, attention.name)
        delta = self._read.delta_net(inner)
        rows = [self._projected(inner, name, x) for name in attention.projections]
        heads = self._row("heads", delta.shape.num_values * delta.shape.value_width)
        call = program.delta(delta, _delta_inputs(delta.shape, rows), heads)

        def place(_: Angles, states: Buffers) -> None:
            if not delta.takes(*states):
                raise NoSpecError("a delta net's running states are of another shape")
            set_states(call, *states)

        return heads, place

    def _latents(
        self, module: nn.Module, layer_idx: int, attention: Latents, x: torch.Tensor
    ) -> tuple[torch.Tensor, Place]:
        program, inner = self._program, part_of(module, attention.name)
        kernel = self._read.latents(inner)
        if getattr(inner, "q_proj", None) is not None:
            query = self._projected(inner, "q_proj", x)
        else:
            low = self._projected(inner, "q_a_proj", x)
            program.norm(self._read.norm(inner, "q_a_layernorm"), low, low)
            query = self._projected(inner, "q_b_proj", low)
        compressed = self._projected(inner, "kv_a_proj_with_mqa", x)
        heads = self._row("heads", kernel.shape.num_heads * kernel.shape.value_width)
        call = program.latent(kernel, layer_idx, query, compressed, heads, attention.rotation)

        def place(angles: Angles, rows: Buffers) -> None:
            if not kernel.takes(*rows):
                raise NoSpecError("latents and their rotated keys do not lie side by side in the cache")
            call.cos, call.sin = (angle.data_ptr() for angle in angles)
            call.cache, call.row_bytes = rows[0].data_ptr(), rows[0].stride(-2) * rows[0].element_size()

        return heads, place

    def _projected(self, module: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
        linear = self._read.linear(module, name)
        row = self._row(name, linear.num_outputs)
        self._program.linear(linear, x, row)
        return row

    def _row(self, name: str, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A row that is read within its layer alone: all layers share it."""
        key = (name, width, dtype or self._dtype)
        if key not in self._scratch:
            self._scratch[key] = self._program.row(width, key[2])
        return self._scratch[key]

    def _moe(self, block: nn.Module, moe: Moe, route: CpuRoute, x: torch.Tensor) -> tuple[FusedMoe, torch.Tensor]:
        program, binding = self._program, find_binding(part_of(block, moe.experts))
        if binding is None or binding.math is None or not self._experts.knows(binding.layer_idx, binding.math):
            raise NoSpecError(f"the kernels do not compute the experts of {type(block).__name__}")
        joined = self._experts.layer(binding.layer_idx, binding.math, binding.num_experts, x, route.weights_1K)
        y = self._row("y", x.numel())
        step = program.experts(joined.experts, route, joined.table_E, x, y)
        ids_K = (ctypes.c_int64 * route.rule.top_k).from_address(route.ids_1K.data_ptr())
        found = FusedMoe(binding=binding, route=route, ids_K=ids_K, step=step, x=x, y=y)
        shared = None if moe.shared is None else part_of(block, moe.shared)
        if shared is None:
            return found, y
        added = self._row("added", x.numel())
        program.mlp(self._read.mlp(shared), x, added)
        if moe.shared_gate is not None:
            gate = self._projected(block, moe.shared_gate, x)
            program.numbers("gate", added, gate, added)
        program.numbers("sum", y, added, added)
        return found, added


def _delta_inputs(shape: DeltaShape, rows: list[torch.Tensor]) -> dict[str, DeltaInput]:
    """Places of a delta net's inputs in its projections' rows."""
    shared, keys = shape.num_values // shape.num_keys, shape.num_keys * shape.key_width
    values, width = shared * shape.value_width, shape.key_width
    if len(rows) == 2:
        stride = 2 * width + 2 * values
        begins = {"query": 0, "key": width, "value": 2 * width, "gate": 2 * width + values}
        found = {name: DeltaInput(row=rows[0], begin=begin, stride=stride) for name, begin in begins.items()}
        return found | {
            name: DeltaInput(row=rows[1], begin=begin, stride=2 * shared)
            for name, begin in (("beta", 0), ("decay", shared))
        }
    return {
        "query": DeltaInput(row=rows[0], begin=0, stride=width),
        "key": DeltaInput(row=rows[0], begin=keys, stride=width),
        "value": DeltaInput(row=rows[0], begin=2 * keys, stride=values),
        "gate": DeltaInput(row=rows[1], begin=0, stride=values),
        "beta": DeltaInput(row=rows[2], begin=0, stride=shared),
        "decay": DeltaInput(row=rows[3], begin=0, stride=shared),
    }


def _place_heads(call: Any, attention: Heads) -> Place:
    def place(angles: Angles, rows: Buffers) -> None:
        cos, sin = angles if attention.rotary is not None else (None, None)
        set_position(call, cos, sin, *rows, half_angles=attention.rotary == "half_table")

    return place
