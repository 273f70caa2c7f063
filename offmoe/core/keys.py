"""The name of one routed expert."""

from __future__ import annotations

from typing import NamedTuple


class ExpertKey(NamedTuple):
    """One routed expert: `layer_idx` counts the experts modules in forward order, not the decoder layers."""

    layer_idx: int
    expert_idx: int
