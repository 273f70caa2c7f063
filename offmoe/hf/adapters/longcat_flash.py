"""LongCat-Flash: the router also chooses experts that compute nothing and answer with their input."""

from __future__ import annotations

from typing import Any

from offmoe.hf.adapters.base import AdaptedExperts, Adapter


def _adapt(moe: Any) -> None:
    experts = moe.experts
    moe.experts = AdaptedExperts(
        num_experts=experts.num_routed_experts, width=experts.hidden_size, expert_width=experts.intermediate_size,
        top_k=moe.router.top_k, act_fn=experts.act_fn, dtype=experts.down_proj.dtype, identity_beyond=True,
    )  # fmt: skip


ADAPTER = Adapter(block="LongcatFlashMoE", adapt=_adapt)
