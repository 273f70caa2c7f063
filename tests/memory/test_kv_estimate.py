"""KV cache from config keys against what the loader counts on the model itself."""

from __future__ import annotations

import pytest
from families import build

from offmoe.kv.probe import probe_model
from offmoe.memory.kv_bytes import estimate_kv

CONTEXT = 200
# Heads of a group, windows, latents, states beside attention: what estimate_kv says it knows.
KNOWN = (
    "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "olmoe", "cohere2_moe", "glm4_moe", "kimi_linear",
    "granitemoe_swa",
)  # fmt: skip
ESTIMATED = ("deepseek_v32", "minimax_m3_vl", "gemma4")


@pytest.mark.parametrize("name", KNOWN)
def test_as_the_loader_will_count_it(name: str) -> None:
    model = build(name)
    found = estimate_kv(model.config.to_dict(), item_bytes=model.dtype.itemsize, context_length=CONTEXT)
    assert found.num_bytes == probe_model(model, CONTEXT).kv_bytes
    assert "estimate" not in found.how


@pytest.mark.parametrize("name", ESTIMATED)
def test_what_is_not_known_is_an_upper_estimate_and_says_so(name: str) -> None:
    model = build(name)
    found = estimate_kv(model.config.to_dict(), item_bytes=model.dtype.itemsize, context_length=CONTEXT)
    assert found.num_bytes >= probe_model(model, CONTEXT).kv_bytes
    assert not found.is_exact and "an estimate" in found.how


def test_a_published_config_needs_no_layer_types() -> None:
    """Qwen3-Next's own config.json says only that every fourth layer attends."""
    config = {
        "num_hidden_layers": 48, "full_attention_interval": 4, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256,
    }  # fmt: skip
    found = estimate_kv(config, item_bytes=2, context_length=1000)
    assert found.num_bytes == 12 * 1000 * 2 * 2 * 256 * 2
    assert "36 of 48 layers keep a state" in found.how
