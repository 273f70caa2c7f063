"""The contract of adapters: how one family's MoE block is made to hand its experts to offmoe.

An adapter replaces the part of the block that holds expert weights by an `AdaptedExperts`, which looks to the loader
like a module behind transformers' own door: attributes that describe the arithmetic, and stacked parameters that are
never loaded. Routing stays the family's code.

Shapes: T tokens, D model width, F expert width, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

from offmoe.hf.internals import KeyRule
from offmoe.hf.seam import serve_experts
from offmoe.kernels.activations import ActivationFunction


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One family. `block` is the class name of its MoE block; `adapt(block)` changes one such module of a model
    without weights; `keys` say where the published tensors go, beyond what transformers knows.
    """

    block: str
    adapt: Callable[[Any], None]
    keys: tuple[KeyRule, ...] = field(default=())


class AdaptedExperts(nn.Module):
    """A layer's experts as the loader sees them: gate_up_proj (or up_proj) and down_proj on the meta device.

    Expert ids from `num_experts` on are padding; with `identity_beyond` they are experts that answer with their input.
    """

    is_concatenated = True
    has_post_expert_norm = False

    def __init__(
        self, *, num_experts: int, width: int, expert_width: int, top_k: int, act_fn: ActivationFunction,
        dtype: torch.dtype, has_gate: bool = True, has_bias: bool = False, is_transposed: bool = False,
        apply_gate: ActivationFunction | None = None, identity_beyond: bool = False,
    ) -> None:  # fmt: skip
        """`apply_gate` takes (N, 2F) gate and up to (N, F); without it, act_fn(gate) * up."""
        super().__init__()
        self.num_experts, self.top_k, self.act_fn = num_experts, top_k, act_fn
        self.has_gate, self.has_bias, self.is_transposed = has_gate, has_bias, is_transposed
        self._own_gate, self.identity_beyond = apply_gate, identity_beyond
        up_name, up_width = ("gate_up_proj", 2 * expert_width) if has_gate else ("up_proj", expert_width)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)

        for name, rows, columns in ((up_name, up_width, width), ("down_proj", width, expert_width)):
            setattr(self, name, parameter(num_experts, *((columns, rows) if is_transposed else (rows, columns))))
            if has_bias:
                setattr(self, f"{name}_bias", parameter(num_experts, rows))

    def _apply_gate(self, gate_up_NF: torch.Tensor) -> torch.Tensor:
        if self._own_gate is not None:
            return self._own_gate(gate_up_NF)
        gate_NF, up_NF = gate_up_NF.chunk(2, dim=-1)
        return self.act_fn(gate_NF) * up_NF

    def forward(self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The experts' weighted sum, in the shape of `x_TD`, which may have more leading dimensions."""
        y_TD = serve_experts(self, x_TD, ids_TK, weights_TK)
        if not self.identity_beyond:
            return y_TD
        kept_T1 = (weights_TK * (ids_TK >= self.num_experts)).sum(dim=-1, keepdim=True)
        return y_TD + (x_TD.reshape(len(kept_T1), -1) * kept_T1).to(x_TD.dtype).view(x_TD.shape)


def replace_forward(block: nn.Module, forward: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]) -> None:
    """`block(...)` runs `forward(block, ...)` from now on."""
    block.forward = MethodType(forward, block)
