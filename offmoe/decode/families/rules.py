"""Routers' rules that many families share."""

from __future__ import annotations

from typing import Any

import torch

from offmoe.decode.spec import Router

FLOAT = torch.float32


def grouped_sigmoid(config: Any, correction: str = "gate.e_score_correction_bias") -> Router:
    """DeepSeek-V3's rule, which many have taken over."""
    groups = (config.n_group, config.topk_group, 2) if (config.n_group or 1) > 1 else None
    return Router(
        scoring="sigmoid", normalised=config.norm_topk_prob, is_sorted=False, scale=config.routed_scaling_factor,
        groups=groups, correction=correction, logits_dtype=FLOAT,
    )  # fmt: skip


def softmax(config: Any, *, normalised: bool | None = None) -> Router:
    """Qwen's rule."""
    return Router(normalised=config.norm_topk_prob if normalised is None else normalised)
