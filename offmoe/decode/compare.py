"""Comparison of two ways to compute the same token, by their logits."""

from __future__ import annotations

import math

import torch

# Largest difference of logits, relative to the largest logit, that is rounding in another order: 1e-6 was seen in
# float32 (five families), up to 2e-2 in 16 bits.
_ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-4}
_ALLOWED_16_BITS = 5e-2


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected logit; infinite where one of the two is no number."""
    found = float((logits.float() - expected.float()).abs().max() / expected.float().abs().max())
    return found if math.isfinite(found) else math.inf


def allowed_difference(dtype: torch.dtype) -> float:
    """Difference up to which logits of a model of that type agree."""
    return _ALLOWED.get(dtype, _ALLOWED_16_BITS)
