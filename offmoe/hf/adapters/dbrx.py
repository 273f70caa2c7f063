"""DBRX: w1 (gate), v1 (up) and w2 (down, turned), each one 2-D tensor with all experts' rows one after another."""

from __future__ import annotations

from typing import Any

from offmoe.hf.adapters.base import AdaptedExperts, Adapter
from offmoe.hf.internals import KeyRule


def _adapt(ffn: Any) -> None:
    glu = ffn.experts.mlp
    ffn.experts = AdaptedExperts(
        num_experts=glu.moe_num_experts, width=glu.hidden_size, expert_width=glu.ffn_hidden_size, top_k=ffn.top_k,
        act_fn=glu.activation_fn, dtype=glu.w1.dtype,
    )  # fmt: skip


ADAPTER = Adapter(
    block="DbrxFFN",
    adapt=_adapt,
    keys=(
        KeyRule(("ffn.experts.mlp.w1", "ffn.experts.mlp.v1"), "ffn.experts.gate_up_proj"),
        KeyRule(("ffn.experts.mlp.w2",), "ffn.experts.down_proj", turned=True),
    ),
)
