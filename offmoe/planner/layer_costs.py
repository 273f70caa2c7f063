"""Fixed costs of a family's layers: by how they are computed, from what the machine was measured at.

A layer is computed whole by the CPU kernels, or its modules one by one. Among the latter some do much more in Python
than others; the classes are from layers of tiny models of every family, with caches emptied before each: 0.4 to 0.9 ms,
0.9 to 1.3, and above. tests/planner/test_plan_speed.py holds the first question to the loader.
"""

from __future__ import annotations

from typing import Any

from offmoe.machine.record import LayerCosts
from offmoe.memory.shape import text_config
from offmoe.planner.inspect import num_hidden_layers

WHOLE = frozenset({
    "afmoe", "aria", "aria_text", "axk1", "cohere2_moe", "deepseek_ocr2", "deepseek_v2", "deepseek_v3", "dots1",
    "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite",
    "glm4v_moe", "glm4v_moe_text", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "grok-1", "hunyuan_v1_moe", "hy_v3", "kimi_k2", "kolibri1", "laguna", "lfm2_moe", "mellum",
    "mimo_v2_flash", "minimax_m2", "mistral4", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker",
    "qwen3_vl_moe", "qwen3_vl_moe_text", "solar_open", "step3p5", "step3p7",
})  # fmt: skip
# More than attention and a block of experts: latent attention, states of recurrent layers, indices, several streams.
_LONG = frozenset({
    "axk2", "bailing_hybrid", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "jamba",
    "kimi_linear", "longcat_flash", "minimax_m3_vl", "minimax_m3_vl_text", "mistral_large4", "qwen4_exp",
    "qwen4_exp_text", "unlimited_ocr",
})  # fmt: skip
_LONGEST = frozenset({
    "deepseek_v4", "glm5_next", "hy_v4", "inkling", "inkling2", "inkling2_text", "inkling_text", "zaya",
})  # fmt: skip
_LONG_FACTOR, _LONGEST_FACTOR = 1.5, 3.0


def layer_cost(model_type: str, costs: LayerCosts) -> tuple[float, float]:
    """Seconds of one layer of the family, beside its bytes; and of a token, beside its layers."""
    if model_type in WHOLE:
        return costs.whole_s, costs.whole_token_s
    factor = _LONGEST_FACTOR if model_type in _LONGEST else _LONG_FACTOR if model_type in _LONG else 1.0
    return factor * costs.modules_s, costs.token_s


def latent_work(config: dict[str, Any], num_tokens: int) -> tuple[float, float]:
    """Work of one token that attends to the latents of `num_tokens` tokens by every head, in all layers.

    Operations, and weights between heads and latents. Zeros for other attention.
    """
    text = text_config(config)
    sizes: list[int] = []
    for name in ("kv_lora_rank", "num_attention_heads", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
        size = text.get(name)
        if type(size) is not int or size <= 0:
            return 0.0, 0.0
        sizes.append(size)
    latent, num_heads, rotated, keys, values = sizes
    num_layers = num_hidden_layers(config)
    operations = 2.0 * num_layers * num_tokens * num_heads * (2 * latent + rotated)
    return operations, float(num_layers * num_heads * latent * (keys + values))
