"""Llama 4: the router's sigmoid scales an expert's input, not its output."""

from __future__ import annotations

from typing import Any

import torch

from offmoe.hf.adapters.base import AdaptedExperts, Adapter, replace_forward


def _adapt(moe: Any) -> None:
    experts = moe.experts
    moe.experts = AdaptedExperts(
        num_experts=experts.num_experts, width=experts.hidden_size, expert_width=experts.expert_dim, top_k=moe.top_k,
        act_fn=experts.act_fn, dtype=experts.down_proj.dtype, is_transposed=True,
    )  # fmt: skip
    replace_forward(moe, _forward)


def _forward(moe: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama4TextMoe's forward, where experts that were not chosen are given zeros and answer zeros."""
    x_TD = hidden_states.reshape(-1, moe.hidden_dim)
    scores_TE, router_logits = moe.router(x_TD)
    ids_TK = router_logits.topk(moe.top_k, dim=1).indices
    scaled_TKD = x_TD[:, None] * scores_TE.gather(1, ids_TK)[..., None]
    ids_N1 = ids_TK.reshape(-1, 1)
    y_ND = moe.experts(scaled_TKD.flatten(0, 1), ids_N1, torch.ones_like(ids_N1, dtype=x_TD.dtype))
    y_TD = moe.shared_expert(x_TD) + y_ND.view(scaled_TKD.shape).sum(dim=1)
    return y_TD, router_logits


ADAPTER = Adapter(block="Llama4TextMoe", adapt=_adapt)
