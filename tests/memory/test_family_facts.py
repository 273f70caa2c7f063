"""Facts of families that loader and planner share: top-k under every published name, and no family by two rules."""

from __future__ import annotations

from typing import Any

import pytest

from offmoe.core.errors import CheckpointError
from offmoe.memory.family_facts import FAMILIES, TOP_K_NAMES, experts_per_token, facts_of_family
from offmoe.memory.shape import largest_number, shape_of

# As the models' own config.json on the hub has it.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "DBRX": ({"model_type": "dbrx", "d_model": 6144, "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}}, 4),
    "DeepSeek-V3": ({"model_type": "deepseek_v3", "n_routed_experts": 256, "num_experts_per_tok": 8}, 8),
    "Ernie 4.5": ({"model_type": "ernie4_5_moe", "moe_num_experts": 64, "moe_k": 6}, 6),
    "Gemma 4": ({"model_type": "gemma4", "text_config": {"num_experts": 128, "top_k_experts": 8}}, 8),
    "gpt-oss": ({"model_type": "gpt_oss", "experts_per_token": 4, "num_experts_per_tok": 4}, 4),
    "Hunyuan": ({"model_type": "hunyuan_v1_moe", "num_experts": 64, "moe_topk": [8] * 32}, 8),
    "Kimi-Linear": ({"model_type": "kimi_linear", "num_experts": 256, "num_experts_per_token": 8}, 8),
    "Mixtral, saved with settings of sampling": ({"model_type": "mixtral", "num_experts_per_tok": 2, "top_k": 50}, 2),
    "NLLB-MoE": ({"model_type": "nllb_moe", "num_experts": 128, "top_k": 50}, 2),
    "Switch": ({"model_type": "switch_transformers", "num_experts": 8, "top_k": 50}, 1),
}  # fmt: skip


def top_k_of_shape(config: dict[str, Any]) -> int:
    return shape_of(
        config, item_bytes=2, eager_attention=False, eager_on_device=False, largest_matrix_bytes=0
    ).top_k  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_experts_of_a_token_in_published_configs(name: str) -> None:
    config, expected = PUBLISHED[name]
    assert experts_per_token(config) == top_k_of_shape(config) == expected


@pytest.mark.parametrize("name", TOP_K_NAMES)
@pytest.mark.parametrize("place", ["", "text_config", "ffn_config"])
def test_every_name_is_read_wherever_it_stands(name: str, place: str) -> None:
    config: dict[str, Any] = {place: {name: 6}} if place else {name: 6}
    assert experts_per_token(config) == top_k_of_shape(config) == 6
    assert experts_per_token({name: [2, 5, 3]}) == 5
    assert experts_per_token({name: None}) == 0 and top_k_of_shape({name: None}) == 1


def test_a_family_is_like_one_that_was_replayed() -> None:
    for name, family in FAMILIES.items():
        assert not (family.hit_rates and family.like), name
        assert family.like is None or FAMILIES[family.like].hit_rates is not None, name
    assert facts_of_family("nobody", None) == facts_of_family() and facts_of_family("nobody", "gpt_oss").has_sinks


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_count_that_is_no_number_is_refused_by_its_name(value: float) -> None:
    with pytest.raises(CheckpointError, match=f"vocab_size = {value}"):
        largest_number({"text_config": {"vocab_size": value}}, "vocab_size", 1)
    assert largest_number({"time_step_limit": [0.0, value], "vocab_size": 7}, "vocab_size", 1) == 7
