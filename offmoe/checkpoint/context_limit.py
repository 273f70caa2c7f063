"""The number of tokens that a model takes, from its config. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offmoe.memory.shape import text_config

_SCALINGS = ("yarn", "longrope")


def context_limit(config: Mapping[str, Any]) -> int | None:
    """Tokens that positions are defined for; None where the config does not say.

    Models whose positions are stretched by yarn take `factor` times the length they were trained with, and
    `max_position_embeddings` may state the one or the other (Qwen's cards add yarn and leave the number as it was).
    Source: https://arxiv.org/abs/2309.00071
    """
    text = text_config(config)
    stated = _whole(text.get("max_position_embeddings", config.get("max_position_embeddings")))
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) not in _SCALINGS:
        return stated
    trained, factor = _whole(rope.get("original_max_position_embeddings")) or stated, rope.get("factor")
    if trained is None or isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor < 1e6:
        return stated
    return max(stated or 0, int(trained * factor))


def _whole(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
