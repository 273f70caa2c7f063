"""Steps of a program for the decoder layers of a model, written from a spec and the weights that `weights.py` reads.

Shapes: D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from offmoe.decode.attends import Move, PlaceRow, attention_steps, place_heads
from offmoe.decode.blocks import FusedMoe, RouterParts, choose, moe_block, per_layer
from offmoe.decode.spec import Attention, Heads, Latents, part_of
from offmoe.decode.steps import Steps
from offmoe.kernels.cpu.layer import CpuTokenLayer
from offmoe.moe.interrupt_safe import FusedExperts


@dataclass(kw_only=True)
class FusedLayer:
    """One decoder layer. `begin`: its first step.

    `input`, `state`, `normed`: its rows, (1, D): before and after attention, and what the block is given. `has_rows`:
    its cache has keys and values, `has_states`: running states. `seen_by`: modules, by the row that is their input.
    `extra`: the row of the token's own embedding for this layer, where there is one. `move`: see `attention_steps`.
    """

    module: nn.Module
    layer_idx: int
    begin: int
    input: torch.Tensor
    state: torch.Tensor
    normed: torch.Tensor
    place: PlaceRow
    has_rows: bool
    has_states: bool
    moe: FusedMoe | None = None
    seen_by: list[tuple[nn.Module, torch.Tensor]] = field(default_factory=list)
    extra: torch.Tensor | None = None
    move: Move | None = None


class LayerWriter:
    """Appends decoder layers to a program."""

    def __init__(self, steps: Steps, experts: FusedExperts) -> None:
        self._steps, self._experts = steps, experts

    def write(self, module: nn.Module, layer_idx: int, x: torch.Tensor, output: torch.Tensor) -> FusedLayer:
        """The layer between two rows. Raises NoSpecError."""
        steps, spec = self._steps, self._steps.spec
        if spec.is_single:
            return self._single(module, layer_idx, x, output)
        program, begin, attention = steps.program, len(steps.program), spec.attention_of(layer_idx)
        block = part_of(module, spec.moe.name)
        is_moe = part_of(block, spec.moe.experts) is not None
        route = steps.read.route(block, spec.moe.router) if is_moe else None
        state, move = program.row(x.numel(), steps.dtype), None
        if self._is_common(attention):
            assert isinstance(attention, Heads)
            place, normed = self._common(module, layer_idx, attention, route, x, state)
        else:
            place, move, normed = self._apart(module, layer_idx, x, state)
            if route is not None:
                choose(steps, block, route, state if spec.moe.beside is not None else normed)
        written = FusedLayer(
            module=module, layer_idx=layer_idx, begin=begin, input=x, state=state, normed=normed, place=place,
            has_rows=isinstance(attention, (Heads, Latents)),
            has_states=not isinstance(attention, (Heads, Latents)), move=move,
        )  # fmt: skip
        written.seen_by = self._seen_by(module, x, state, normed)
        if route is None:
            dense = block if spec.moe.beside is None else part_of(block, spec.moe.shared or "")
            added = steps.row("added", x.numel())
            program.mlp(steps.read.mlp(dense), normed, added)
        else:
            written.moe, added = moe_block(steps, self._experts, module, route[1], normed, state)
        if spec.norms[3]:
            steps.normed(module, spec.norms[3], added, added)
        program.numbers("sum", state, added, output, scale=spec.residual)
        self._end(module, written, output)
        return written

    def _single(self, module: nn.Module, layer_idx: int, x: torch.Tensor, output: torch.Tensor) -> FusedLayer:
        """The layer of one norm, and attention or a block."""
        steps, spec = self._steps, self._steps.spec
        program, begin, attention = steps.program, len(steps.program), spec.attention_of(layer_idx)
        given = steps.normed(module, spec.norms[0], x, program.row(x.numel(), steps.dtype))
        written = FusedLayer(
            module=module, layer_idx=layer_idx, begin=begin, input=x, state=x, normed=given, place=lambda *_: None,
            has_rows=isinstance(attention, (Heads, Latents)),
            has_states=not isinstance(attention, (Heads, Latents, type(None))),
        )  # fmt: skip
        written.seen_by = [(module, x), (part_of(module, spec.norms[0]), x)]
        block = part_of(module, spec.moe.name)
        if attention is not None:
            added, written.place, written.move = attention_steps(steps, module, layer_idx, given)
        elif part_of(block, spec.moe.experts) is not None:
            route = steps.read.route(block, spec.moe.router)
            choose(steps, block, route, given)
            written.moe, added = moe_block(steps, self._experts, module, route[1], given, x)
            gate = part_of(block, spec.moe.router.weight.rpartition(".")[0])
            written.seen_by += [(block, given), (gate, given)]
        else:
            added = steps.row("added", x.numel())
            program.mlp(steps.read.mlp(block), given, added)
        program.numbers("sum", x, added, output, scale=spec.residual)
        return written

    def _common(
        self, module: nn.Module, layer_idx: int, attention: Heads, route: RouterParts | None, x: torch.Tensor,
        state: torch.Tensor,
    ) -> tuple[PlaceRow, torch.Tensor]:  # fmt: skip
        """Append a layer up to its router's choice as one job of the kernels."""
        read, spec = self._steps.read, self._steps.spec
        layer = CpuTokenLayer(
            self._steps.kernels, read.heads(module, attention),
            (read.norm(module, spec.norms[0]), read.norm(module, spec.norms[2])),
            [read.linear(module, f"{attention.name}.{name}") for name in attention.projections], route,
        )  # fmt: skip
        return place_heads(self._steps.program.layer(layer, layer_idx, x, state), attention), layer.normed_1D

    def _apart(
        self, module: nn.Module, layer_idx: int, x: torch.Tensor, state: torch.Tensor
    ) -> tuple[PlaceRow, Move | None, torch.Tensor]:
        """Append norm, attention, sum and norm. Returns the row that the block is given."""
        steps, spec = self._steps, self._steps.spec
        given = x
        if spec.norms[0]:
            given = steps.normed(module, spec.norms[0], x, steps.row("given", x.numel()))
        attended, place, move = attention_steps(steps, module, layer_idx, given)
        if spec.norms[1]:
            steps.normed(module, spec.norms[1], attended, attended)
        steps.program.numbers("sum", x, attended, state, scale=spec.residual)
        if spec.is_parallel:
            return place, move, given
        if not spec.norms[2]:
            return place, move, state
        return place, move, steps.normed(module, spec.norms[2], state, steps.program.row(x.numel(), steps.dtype))

    def _seen_by(
        self, module: nn.Module, x: torch.Tensor, state: torch.Tensor, normed: torch.Tensor
    ) -> list[tuple[nn.Module, torch.Tensor]]:
        """Modules whose input is one of the layer's rows, in the order in which they see it."""
        spec = self._steps.spec
        seen = [(module, x)]
        if spec.is_parallel:
            seen.append((part_of(module, spec.norms[0]), x))
        if spec.norms[2]:
            seen.append((part_of(module, spec.norms[2]), state))
        block, router = part_of(module, spec.moe.name), spec.moe.router
        if spec.moe.name:
            seen.append((block, normed))
        row = state if spec.moe.beside is not None else normed
        name = router.norm or router.weight
        parents = [name] if router.norm else []
        while name := name.rpartition(".")[0]:
            parents.insert(0, name)
        gates = (part_of(block, parent) for parent in parents)
        return seen + [(gate, row) for gate in gates if gate is not None]

    def _end(self, module: nn.Module, written: FusedLayer, output: torch.Tensor) -> None:
        """Append what a layer does to its sum."""
        steps = self._steps
        if steps.spec.per_layer:
            gate = steps.read.linear(module, "per_layer_input_gate")
            written.extra = steps.program.row(gate.num_outputs, steps.dtype)
            per_layer(steps, module, written.extra, output)
        if steps.spec.layer_scale is not None:
            factor = steps.read.factors(module, steps.spec.layer_scale)
            if not bool((factor == 1).all()):
                steps.program.numbers("multiply", output, factor, output)

    def _is_common(self, attention: Attention | None) -> bool:
        """One job of the kernels computes it up to the router's choice."""
        spec = self._steps.spec
        router = spec.moe.router
        return (
            isinstance(attention, Heads) and not attention.gated
            and (attention.clip, attention.gate, attention.value_norm, attention.value_scale) == (None,) * 4
            and [bool(name) for name in spec.norms] == [True, False, True, False] and spec.norm_kind != "centred"
            and spec.residual == 1.0 and not spec.is_parallel and router.logits_cap is None and router.norm is None
        )  # fmt: skip
