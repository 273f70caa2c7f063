"""Steps of what a layer has behind its attention: a dense block, or a router, experts and a shared expert.

Shapes: D model width, E experts, K experts a token.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offmoe.decode.spec import NoSpecError, Router, part_of
from offmoe.decode.steps import Steps
from offmoe.hf.seam import LayerBinding, find_binding
from offmoe.kernels.cpu.decode import CpuLinear
from offmoe.kernels.cpu.layer import CpuRoute
from offmoe.moe.interrupt_safe import FusedExperts

RouterParts = tuple[CpuLinear, CpuRoute]


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


def choose(steps: Steps, block: nn.Module, route: RouterParts, x: torch.Tensor) -> None:
    """Append the router's choice for the row x. Raises NoSpecError."""
    program, router, (linear, rule) = steps.program, steps.spec.moe.router, route
    given = _router_input(steps, block, router, x)
    logits = steps.row("logits", linear.num_outputs, rule.logits_dtype)
    program.linear(linear, given, logits)
    if router.logits_cap is not None:
        program.numbers("cap", logits, None, logits, scale=router.logits_cap)
    program.choose(rule, logits)


def _router_input(steps: Steps, block: nn.Module, router: Router, x: torch.Tensor) -> torch.Tensor:
    program = steps.program
    if router.norm is None and router.input_scale is None:
        return x
    given = steps.row("router's input", x.numel())
    norm = None if router.norm is None else steps.read.norm(block, router.norm, width=x.numel())
    assert norm is not None, f"{router=}"
    program.norm(norm, x, given)
    if router.input_scale is not None:
        program.numbers("multiply", given, steps.read.factors(block, router.input_scale), given)
    if router.input_factor != 1.0:
        program.numbers("scale", given, None, given, scale=router.input_factor)
    return given


def moe_block(
    steps: Steps, experts: FusedExperts, module: nn.Module, route: CpuRoute, normed: torch.Tensor, state: torch.Tensor
) -> tuple[FusedMoe, torch.Tensor]:
    """Append the experts that were chosen, and what is added to their sum. `state` is the row before the block's norm.
    Returns the experts and the row of the whole block. Raises NoSpecError.
    """
    program, moe = steps.program, steps.spec.moe
    block = part_of(module, moe.name)
    x = normed if moe.beside is None else steps.normed(module, moe.beside.before_experts, state)
    found, y = _experts(steps, experts, block, route, x)
    if moe.scale != 1.0:
        scaled = steps.row("scaled", x.numel())
        program.numbers("scale", y, None, scaled, scale=moe.scale)
        y = scaled
    if moe.beside is not None:
        y = steps.normed(module, moe.beside.after_experts, y)
    shared = None if moe.shared is None else part_of(block, moe.shared)
    if shared is not None:
        y = _with_shared(steps, module, block, shared, normed, y)
    if moe.norm is not None:
        y = steps.normed(block, moe.norm, y)
    return found, y


def _experts(
    steps: Steps, experts: FusedExperts, block: nn.Module, route: CpuRoute, x: torch.Tensor
) -> tuple[FusedMoe, torch.Tensor]:  # fmt: skip
    """Append the experts alone. Returns them and the row that they give the block."""
    moe = steps.spec.moe
    narrowed = moe.narrowed if moe.narrowed and isinstance(part_of(block, moe.narrowed[0]), nn.Linear) else None
    if narrowed is not None:
        x = steps.projected(block, narrowed[0], x)
    binding = find_binding(part_of(block, moe.experts))
    if binding is None or binding.math is None or not experts.knows(binding.layer_idx, binding.math):
        raise NoSpecError(f"the kernels do not compute the experts of {type(block).__name__}")
    joined = experts.layer(binding.layer_idx, binding.math, binding.num_experts, x, route.weights_1K)
    y = steps.row("y", x.numel())
    step = steps.program.experts(joined.experts, route, joined.table_E, x, y)
    ids_K = (ctypes.c_int64 * route.rule.top_k).from_address(route.ids_1K.data_ptr())
    found = FusedMoe(binding=binding, route=route, ids_K=ids_K, step=step, x=x, y=y)
    return found, y if narrowed is None else steps.projected(block, narrowed[1], y)


def _with_shared(
    steps: Steps, module: nn.Module, block: nn.Module, shared: Any, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Append the shared MLP of x and its sum with the experts' row y."""
    program, moe = steps.program, steps.spec.moe
    added = steps.row("added", x.numel())
    program.mlp(steps.read.mlp(shared, moe.shared_mlp), x, added)
    if moe.beside is not None:
        steps.normed(module, moe.beside.after_mlp, added, added)
    if moe.shared_gate is not None:
        gate = steps.projected(block, moe.shared_gate, x)
        program.numbers("gate", added, gate, added)
    program.numbers("sum", y, added, added)
    if moe.total_scale != 1.0:
        program.numbers("scale", added, None, added, scale=moe.total_scale)
    return added


def per_layer(steps: Steps, module: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> None:
    """Append Gemma's per-layer embedding: `inputs` is the token's row for this layer. Raises NoSpecError."""
    program = steps.program
    gate = steps.projected(module, "per_layer_input_gate", output)
    program.activate(steps.read.activation(module, gate.numel()), gate, inputs, gate)
    added = steps.projected(module, "per_layer_projection", gate)
    steps.normed(module, "post_per_layer_input_norm", added, added)
    program.numbers("sum", output, added, output)
