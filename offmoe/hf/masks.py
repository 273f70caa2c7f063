"""Attention masks of one token."""

from __future__ import annotations

from typing import Any

import torch


def mask_sees_all(mask: Any) -> bool:
    """The one token sees every row that the cache gives it. Masks are of one sequence: a row is one number."""
    if mask is None:
        return True
    if not isinstance(mask, torch.Tensor) or mask.shape[:-1] != (1, 1, 1):
        return False
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())
