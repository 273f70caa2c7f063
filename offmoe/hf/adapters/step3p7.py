"""Step 3.7: in some layers gate (after its activation) and up are clamped."""

from __future__ import annotations

from typing import Any

import torch

from offmoe.hf.adapters.base import AdaptedExperts, Adapter
from offmoe.kernels.activations import ActivationFunction


def _adapt(moe: Any) -> None:
    experts = moe.experts
    moe.experts = AdaptedExperts(
        num_experts=experts.num_experts, width=experts.hidden_dim, expert_width=experts.intermediate_dim,
        top_k=moe.gate.top_k, act_fn=experts.act_fn, dtype=experts.down_proj.dtype,
        apply_gate=None if experts.limit == float("inf") else _clamped(experts.act_fn, experts.limit),
    )  # fmt: skip


def _clamped(act_fn: ActivationFunction, limit: float) -> ActivationFunction:
    def apply_gate(gate_up_NF: torch.Tensor) -> torch.Tensor:
        gate_NF, up_NF = gate_up_NF.chunk(2, dim=-1)
        return act_fn(gate_NF).clamp(max=limit) * up_NF.clamp(min=-limit, max=limit)

    return apply_gate


ADAPTER = Adapter(block="Step3p7SparseMoeBlock", adapt=_adapt)
