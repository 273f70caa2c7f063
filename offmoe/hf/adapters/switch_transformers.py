"""Switch Transformers: one expert a token. Tokens over an expert's capacity get zeros, so the residual carries them."""

from __future__ import annotations

from typing import Any

import torch

from offmoe.hf.adapters.base import AdaptedExperts, Adapter, replace_forward
from offmoe.hf.internals import KeyRule


def _adapt(mlp: Any) -> None:
    first = mlp.experts["expert_0"]
    expert_width, width = first.wi.weight.shape
    mlp.experts = AdaptedExperts(
        num_experts=mlp.experts.num_experts, width=width, expert_width=expert_width, top_k=1, act_fn=first.act,
        dtype=first.wi.weight.dtype, has_gate=False,
    )  # fmt: skip
    replace_forward(mlp, _forward)


def _forward(mlp: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """SwitchTransformersSparseMLP's forward: capacity counts per sequence, in the order of its tokens."""
    chosen_BSE, weights_BS1, _ = mlp.router(hidden_states)
    ids_T1 = chosen_BSE.argmax(dim=-1).masked_fill(chosen_BSE.sum(dim=-1) == 0, mlp.experts.num_experts).view(-1, 1)
    x_TD = hidden_states.reshape(len(ids_T1), -1)
    y: torch.Tensor = mlp.experts(x_TD, ids_T1, weights_BS1.view(-1, 1)).view(hidden_states.shape)
    return y


ADAPTER = Adapter(
    block="SwitchTransformersSparseMLP",
    adapt=_adapt,
    keys=(
        KeyRule(("mlp.experts.expert_*.wi.weight",), "mlp.experts.up_proj"),
        KeyRule(("mlp.experts.expert_*.wo.weight",), "mlp.experts.down_proj"),
    ),
)
