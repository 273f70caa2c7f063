"""Facts of model families that no checkpoint states: each once, for the loader and the planner. No torch.

A family without an entry has none of them: its config's own numbers say all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

# Names that published configs give to a token's experts, the plainest first: where there are several, the first counts.
# `top_k` is last, since older configs hold it as a setting of sampling.
TOP_K_NAMES = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "top_k_experts",
    "num_selected_experts", "moe_k", "top_k",
)  # fmt: skip
# And to the routed experts of a layer.
EXPERT_COUNT_NAMES = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
    "num_moe_experts", "moe_num_routed_experts", "num_local_routed_experts",
)  # fmt: skip
# Kinds of layers (`layer_types`) whose keys and values are kept and attended to, and those with a running state.
ATTENTION_KINDS = ("full_attention", "sliding_attention")
STATE_KINDS = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp", "kda", "lightning")


@dataclass(frozen=True, kw_only=True)
class FamilyFacts:
    """One family.

    `writes_scores`: transformers has its attention in the plain form alone, which writes scores out. `has_sinks`: so it
    does on a device; on the CPU offmoe leaves sinks to the fused operation (attention/sinks.py). `top_k`: of a router
    whose code has the number. `hit_rates`: published replays with LRU over all layers, at 12.5, 25 and 37.5% of the
    experts. `like`: a family of the same design, whose hit rates are taken for this one's.
    """

    writes_scores: bool = False
    has_sinks: bool = False
    top_k: int = 0
    hit_rates: tuple[float, float, float] | None = None
    like: str | None = None


_PLAIN = FamilyFacts()
_SINKS = FamilyFacts(has_sinks=True)
_SCORES = FamilyFacts(writes_scores=True)
FAMILIES: dict[str, FamilyFacts] = {
    "deepseek_v2": FamilyFacts(hit_rates=(0.30, 0.47, 0.60)),
    "deepseek_v3": FamilyFacts(like="deepseek_v2"),
    "deepseek_v32": FamilyFacts(like="deepseek_v2"),
    "deepseek_v4": _SINKS,
    "flint": _SINKS,
    "gemma4": _SCORES,
    "gpt_oss": replace(_SINKS, hit_rates=(0.46, 0.68, 0.81)),
    "granitemoe_swa": _SINKS,
    "hy_v4": _SCORES,
    "inkling2": _SCORES,
    "inkling2_text": _SCORES,
    "mimo_v2_flash": _SINKS,
    "minimax": FamilyFacts(like="mixtral"),
    "mixtral": FamilyFacts(hit_rates=(0.0, 0.37, 0.50)),
    "nllb_moe": replace(_SCORES, top_k=2),
    "olmoe": FamilyFacts(hit_rates=(0.47, 0.65, 0.76)),
    "phimoe": FamilyFacts(like="mixtral"),
    "qwen2_moe": FamilyFacts(like="qwen3_moe"),
    "qwen3_5_moe": FamilyFacts(like="qwen3_moe"),
    "qwen3_moe": FamilyFacts(hit_rates=(0.61, 0.81, 0.91)),
    "qwen3_next": FamilyFacts(like="qwen3_moe"),
    "qwen3_vl_moe": FamilyFacts(like="qwen3_moe"),
    "switch_transformers": FamilyFacts(top_k=1),
}


def facts_of_family(*model_types: object) -> FamilyFacts:
    """Return the facts of the first of the names that has an entry; those of an unknown family otherwise."""
    return next((FAMILIES[name] for name in model_types if isinstance(name, str) and name in FAMILIES), _PLAIN)


def experts_per_token(config: Mapping[str, Any]) -> int:
    """A token's experts in a layer, as a published config says anywhere in it: the most of any layer. 0: unknown."""
    known = facts_of_family(config.get("model_type")).top_k
    return known or next((max(found) for name in TOP_K_NAMES if (found := set(whole_numbers(config, (name,))))), 0)


def whole_numbers(config: Mapping[str, Any], names: Iterable[str]) -> set[int]:
    """Every positive whole number under one of `names`, anywhere in the config; lists may give one a layer."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= whole_numbers(value, names)
        elif key in names:
            items = value if isinstance(value, (list, tuple)) else [value]
            found |= {item for item in items if type(item) is int and item > 0}
    return found
