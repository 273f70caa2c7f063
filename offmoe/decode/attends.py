"""Steps of a layer's attention, of each kind, between the layer's input and the row that is added to it.

Shapes: D model width, H heads, W head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from offmoe.decode.spec import DeltaNet, Heads, Latents, Mamba, NoSpecError, ShortConv, part_of
from offmoe.decode.steps import Steps
from offmoe.kernels.cpu.decode import set_position
from offmoe.kernels.cpu.delta import DeltaInput, DeltaShape, set_states
from offmoe.kernels.cpu.short_conv import set_state

Angles = tuple[torch.Tensor, torch.Tensor]
# All rows of a layer's cache, keys and values; or its running states, of which the second may be missing.
States = tuple[torch.Tensor, Any]
# Tells a layer's attention of the token's angles and of its states, the token's own row the last.
PlaceRow = Callable[[Angles, States], None]
# Tells a layer's attention of the token's position.
Move = Callable[[int], None]


def attention_steps(
    steps: Steps, module: nn.Module, layer_idx: int, given: torch.Tensor
) -> tuple[torch.Tensor, PlaceRow, Move | None]:  # fmt: skip
    """Append a layer's attention to the row `given`. Returns the row that it answers with, and the functions that tell
    it of the token's place and, where that matters beside its angles, of its position. Raises NoSpecError.
    """
    attention = steps.spec.attention_of(layer_idx)
    assert attention is not None, f"{layer_idx=}"
    move: Move | None = None
    if isinstance(attention, DeltaNet):
        heads, place = _delta_net(steps, module, attention, given)
        name = f"{attention.name}.out_proj"
    elif isinstance(attention, Latents):
        heads, place, move = _latents(steps, module, layer_idx, attention, given)
        name = f"{attention.name}.o_proj"
    elif isinstance(attention, Mamba):
        heads, place = _mamba(steps, module, attention, given)
        name = f"{attention.name}.{attention.projections[1]}"
    elif isinstance(attention, ShortConv):
        heads, place = _short_conv(steps, module, attention, given)
        name = f"{attention.name}.{attention.projections[1]}"
    else:
        heads, place = _grouped(steps, module, layer_idx, attention, given)
        name = f"{attention.name}.{attention.projections[3]}"
    attended = steps.row("attended", given.numel())
    steps.program.linear(steps.read.linear(module, name), heads, attended)
    return attended, place, move


def _grouped(
    steps: Steps, module: nn.Module, layer_idx: int, attention: Heads, x: torch.Tensor
) -> tuple[torch.Tensor, PlaceRow]:
    program, inner = steps.program, part_of(module, attention.name)
    norms = attention.norms or ()
    if attention.clip is not None:  # after the norms, which are steps of their own then
        attention = replace(attention, norms=None)
    kernel = steps.read.heads(module, attention)
    width = kernel.shape.width
    names = [name for name in attention.projections[:3] if part_of(inner, name) is not None]
    rows = [steps.projected(inner, name, x) for name in names]
    if attention.clip is not None:
        for name, row in zip(norms, rows, strict=False):
            program.norm(steps.read.norm(inner, name), row, row)
        for row in rows:
            program.numbers("clamp", row, None, row, scale=attention.clip)
    query, key, value = rows[0], rows[1], rows[-1]
    if attention.value_norm is not None:
        value = steps.row("normed value", value.numel())
        program.norm(steps.read.norm(inner, attention.value_norm, width=width), rows[-1], value)
    if attention.value_scale is not None and (scale := getattr(inner, attention.value_scale)) != 1.0:
        program.numbers("scale", value, None, value, scale=scale)
    heads = steps.row("heads", kernel.shape.num_heads * kernel.shape.value_width)
    gate = None
    if attention.gated:  # each head's query, and behind it its gate
        query, gate = (steps.row(name, rows[0].numel() // 2) for name in ("query", "gate"))
        program.copy(rows[0], 0, 2 * width, query, width)
        program.copy(rows[0], width, 2 * width, gate, width)
    elif attention.gate is not None and part_of(inner, attention.gate) is not None:
        gate = steps.projected(inner, attention.gate, x)
    call = program.attend(kernel, layer_idx, (query, key, value), heads)
    if gate is not None:
        program.numbers(attention.gate_curve, heads, gate, heads)
    return heads, place_heads(call, attention)


def place_heads(call: Any, attention: Heads) -> PlaceRow:
    """The function that tells an attention of grouped heads of its place."""

    def place(angles: Angles, rows: States) -> None:
        cos, sin = angles if attention.rotary is not None else (None, None)
        set_position(call, cos, sin, *rows, half_angles=attention.rotary in ("half_table", "pairs"))

    return place


def _latents(
    steps: Steps, module: nn.Module, layer_idx: int, attention: Latents, x: torch.Tensor
) -> tuple[torch.Tensor, PlaceRow, Move | None]:
    program, inner = steps.program, part_of(module, attention.name)
    kernel = steps.read.latents(inner)
    if getattr(inner, "q_proj", None) is not None:
        query = steps.projected(inner, "q_proj", x)
    else:
        low = steps.projected(inner, "q_a_proj", x)
        program.norm(steps.read.norm(inner, "q_a_layernorm"), low, low)
        query = steps.projected(inner, "q_b_proj", low)
    compressed = steps.projected(inner, "kv_a_proj_with_mqa", x)
    heads = steps.row("heads", kernel.shape.num_heads * kernel.shape.value_width)
    call = program.latent(kernel, layer_idx, query, compressed, heads, attention.rotation)

    def place(angles: Angles, rows: States) -> None:
        if not kernel.takes(*rows):
            raise NoSpecError("latents and their rotated keys do not lie side by side in the cache")
        call.cos, call.sin = (angle.data_ptr() for angle in angles)
        call.cache, call.row_bytes = rows[0].data_ptr(), rows[0].stride(-2) * rows[0].element_size()

    if (query_scale := attention.query_scale) is None:
        return heads, place, None

    def move(position: int) -> None:
        call.scale = kernel.shape.scale * query_scale(position)

    return heads, place, move


def _delta_net(steps: Steps, module: nn.Module, attention: DeltaNet, x: torch.Tensor) -> tuple[torch.Tensor, PlaceRow]:
    inner = part_of(module, attention.name)
    delta = steps.read.delta_net(inner)
    rows = [steps.projected(inner, name, x) for name in attention.projections]
    heads = steps.row("heads", delta.shape.num_values * delta.shape.value_width)
    call = steps.program.delta(delta, _delta_inputs(delta.shape, rows), heads)

    def place(_: Angles, states: States) -> None:
        if not delta.takes(*states):
            raise NoSpecError("a delta net's running states are of another shape")
        set_states(call, *states)

    return heads, place


def _short_conv(
    steps: Steps, module: nn.Module, attention: ShortConv, x: torch.Tensor
) -> tuple[torch.Tensor, PlaceRow]:
    inner = part_of(module, attention.name)
    conv = steps.read.short_conv(inner, attention)
    parts = steps.projected(inner, attention.projections[0], x)
    mixed = steps.row("mixed", parts.numel() // 3)
    call = steps.program.conv(conv, parts, mixed)

    def place(_: Angles, states: States) -> None:
        if not conv.takes(states[0]):
            raise NoSpecError("a short convolution's running state is of another shape")
        set_state(call, states[0])

    return mixed, place


def _mamba(steps: Steps, module: nn.Module, attention: Mamba, x: torch.Tensor) -> tuple[torch.Tensor, PlaceRow]:
    inner = part_of(module, attention.name)
    mamba = steps.read.mamba(inner)
    heads = steps.row("heads", mamba.shape.values)
    call = steps.program.mamba(mamba, steps.projected(inner, attention.projections[0], x), heads)

    def place(_: Angles, states: States) -> None:
        if not mamba.takes(*states):
            raise NoSpecError("a Mamba mixer's running states are of another shape")
        set_states(call, *states)

    return heads, place


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
