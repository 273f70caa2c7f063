"""Share of a token's experts that a cache holds: from a trace of the model itself, or from published replays.

Published: LRU over all layers, per-layer replays of real text (OLMoE, DeepSeek-V2-Lite, Qwen3-30B-A3B, gpt-oss,
Mixtral), at 12.5, 25 and 37.5% of the experts. Families without one take OLMoE's, which is in the middle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from offmoe.cache.replay import layer_calls, lru_curve
from offmoe.memory.family_facts import FAMILIES, facts_of_family
from offmoe.trace.file import Trace

_SHARES = (0.0, 0.125, 0.25, 0.375, 1.0)
DEFAULT = "olmoe"


@dataclass(frozen=True, kw_only=True)
class HitCurve:
    """Hit rate at a number of slots, and where it comes from."""

    at: Callable[[int], float]
    source: str


def published_curve(model_type: str, *, num_experts: int, per_token: int) -> HitCurve:
    """The family's, read off at a share of the experts; `per_token` experts are used by one token in all layers.

    With fewer slots than that, each layer has its own share, and what a token finds was used by the one before.
    """
    family = facts_of_family(model_type)
    name = model_type if family.hit_rates else family.like or DEFAULT
    published = FAMILIES[name].hit_rates
    assert published is not None, f"{name=}"
    rates = (0.0, *published, 1.0)  # with no slot nothing is found, with all of them everything
    whose = f"published replays of {name}" + ("" if name == model_type else f", for want of {model_type}'s own")

    def at(num_slots: int) -> float:
        share = min(1.0, num_slots / num_experts)
        rate = interpolate(share, rates)
        # One pool of fewer slots than a token uses finds nothing; quotas find at most as many as there are slots.
        return min(rate, num_slots / per_token)

    return HitCurve(at=at, source=f"{whose} (LRU)")


def traced_curve(trace: Trace, expert_bytes: int) -> HitCurve:
    """LRU on the model's own trace, at every size; decoding alone."""
    per_layer = list(trace.header.experts_per_layer)
    curve = lru_curve(layer_calls(trace.events), per_layer, [expert_bytes] * len(per_layer))
    source = f"LRU on a trace of {trace.num_decoded} decoded tokens"
    return HitCurve(at=lambda num_slots: curve.at(num_slots).decode.hit_rate, source=source)


def interpolate(share: float, rates: tuple[float, ...]) -> float:
    """The rate between the two nearest known shares."""
    for (left, low), (right, high) in zip(
        zip(_SHARES, rates, strict=True), zip(_SHARES[1:], rates[1:], strict=True), strict=False
    ):
        if share <= right:
            return low + (high - low) * (share - left) / (right - left)
    return rates[-1]
