"""JetMoE: the feed-forward experts stream. The experts of its attention (query and output matrices) stay resident."""

from __future__ import annotations

from typing import Any

import torch

from offmoe.hf.adapters.base import AdaptedExperts, Adapter, replace_forward
from offmoe.hf.internals import KeyRule


def _adapt(moe: Any) -> None:
    moe.experts = AdaptedExperts(
        num_experts=moe.router.num_experts, width=moe.input_size, expert_width=moe.hidden_size, top_k=moe.router.top_k,
        act_fn=moe.activation, dtype=moe.input_linear.weight.dtype,
    )  # fmt: skip
    del moe.input_linear, moe.output_linear
    replace_forward(moe, _forward)


def _forward(moe: Any, layer_input: torch.Tensor) -> torch.Tensor:
    """JetMoeMoE's forward without sorting rows by expert."""
    x_TD = layer_input.reshape(-1, layer_input.shape[-1])
    top_logits_TK, ids_TK = moe.router.layer(x_TD).float().topk(moe.router.top_k, dim=1)
    weights_TK = torch.softmax(top_logits_TK, dim=1).type_as(x_TD)
    y: torch.Tensor = moe.experts(x_TD, ids_TK, weights_TK).view(layer_input.shape) + moe.bias
    return y


ADAPTER = Adapter(
    block="JetMoeMoE",
    adapt=_adapt,
    keys=(
        KeyRule(("mlp.input_linear.weight",), "mlp.experts.gate_up_proj"),
        KeyRule(("mlp.output_linear.weight",), "mlp.experts.down_proj"),
    ),
)
