"""NLLB-MoE: two experts a token with a capacity, biases in the experts.

transformers 5.23's own experts loop takes the router's 0/1 mask for expert numbers, so that only experts 0 and 1 ever
run. Here tokens go to the experts that the router chose, as published (fairseq) and as transformers 4 does.
"""

from __future__ import annotations

from typing import Any

import torch

from offmoe.hf.adapters.base import AdaptedExperts, Adapter, replace_forward
from offmoe.hf.internals import KeyRule

_TOP_K = 2


def _adapt(mlp: Any) -> None:
    first = mlp.experts["expert_0"]
    expert_width, width = first.fc1.weight.shape
    mlp.kept_share = 1.0 - mlp.experts.moe_token_dropout
    mlp.experts = AdaptedExperts(
        num_experts=mlp.num_experts, width=width, expert_width=expert_width, top_k=_TOP_K, act_fn=first.act,
        dtype=first.fc1.weight.dtype, has_gate=False, has_bias=True,
    )  # fmt: skip
    replace_forward(mlp, _forward)


def _forward(mlp: Any, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Weights are zero where an expert is over its capacity: such a pair is padding. Both: the residual carries it."""
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    _, probabilities_TE, _ = mlp.router(x_TD, padding_mask)
    weights_TK, ids_TK = probabilities_TE.topk(min(_TOP_K, mlp.num_experts), dim=1)
    ids_TK = ids_TK.masked_fill(weights_TK == 0, mlp.num_experts)
    y: torch.Tensor = mlp.experts(x_TD, ids_TK, weights_TK * mlp.kept_share).view(hidden_states.shape)
    return y


def _rules() -> tuple[KeyRule, ...]:
    places = (("fc1", "up_proj"), ("fc2", "down_proj"))
    return tuple(
        KeyRule((f"ffn.experts.expert_*.{linear}.{leaf}",), f"ffn.experts.{target}{suffix}")
        for linear, target in places
        for leaf, suffix in (("weight", ""), ("bias", "_bias"))
    )


ADAPTER = Adapter(block="NllbMoeSparseMLP", adapt=_adapt, keys=_rules())
