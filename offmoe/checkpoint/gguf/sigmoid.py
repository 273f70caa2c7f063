"""GGUF architectures of DeepSeek's line: experts in groups, scored by sigmoids, others shared. No torch."""

from __future__ import annotations

from typing import Any

from offmoe.checkpoint.gguf.architecture import (
    ATTENTION,
    FFN_NORM,
    LATENT,
    LATENT_JOINS,
    POST_ATTENTION_NORM,
    QK_NORMS,
    QKV,
    SIGMOID,
    SOFTMAX,
    Architecture,
    as_row,
    experts_of,
    mlp,
)
from offmoe.checkpoint.gguf.facts import GgufFacts
from offmoe.checkpoint.gguf.rope import rope
from offmoe.core.errors import CheckpointError, UnsupportedModelError

_CORRECTION = dict.fromkeys(("exp_probs_b.bias", "exp_probs_b"), "mlp.gate.e_score_correction_bias")
_ROUTED = mlp("mlp") | mlp("mlp.shared_experts", "_shexp") | {"ffn_gate_inp": "mlp.gate"}


def _routed(facts: GgufFacts, *, norm: bool = False) -> dict[str, Any]:
    """The experts, as DeepSeek's configs say it. Without a number of groups there is one, as in llama.cpp."""
    num_experts, width = facts.experts()
    shared = "blk.*.ffn_gate_shexp.weight"
    dense = set(range(facts.num_layers())) - facts.layers_with("ffn_gate_inp.")
    if dense != set(range(len(dense))):
        raise UnsupportedModelError(f"the GGUF file has no experts in layer {max(dense)}, and some before it")
    return {
        "n_routed_experts": num_experts, "moe_intermediate_size": width,
        "n_shared_experts": facts.rows(shared) // width if facts.has(shared) else None,
        "first_k_dense_replace": len(dense),
        "n_group": max(1, facts.number("expert_group_count", 0)),
        "topk_group": max(1, facts.number("expert_group_used_count", 0)),
        "routed_scaling_factor": facts.real("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": facts.flag("expert_weights_norm", norm), "num_nextn_predict_layers": 0,
    }  # fmt: skip


def latent_sizes(facts: GgufFacts) -> dict[str, Any]:
    """Sizes of multi-head latent attention."""
    rotary = facts.size("rope.dimension_count")
    head = facts.size("attention.key_length_mla", facts.size("attention.key_length"))
    facts.get("attention.value_length")
    if head <= rotary:
        raise CheckpointError(f"the GGUF file says heads of {head} numbers, {rotary} of them rotated; more are needed")
    return {
        "num_key_value_heads": facts.size("attention.head_count"), "head_dim": rotary,
        "kv_lora_rank": facts.size("attention.kv_lora_rank"),
        "q_lora_rank": facts.number("attention.q_lora_rank", 0) or None, "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": head - rotary,
        "v_head_dim": facts.size("attention.value_length_mla", facts.size("attention.value_length")),
    }  # fmt: skip


def _deepseek(facts: GgufFacts) -> dict[str, Any]:
    """DeepSeek-V2 where experts are scored by a softmax, V3 (Kimi K2 too) where they are by a sigmoid."""
    sizes, routed = latent_sizes(facts), _routed(facts)
    facts.expect("rope.scaling.attn_factor", 1.0)
    multiplier = facts.real("rope.scaling.yarn_log_multiplier", 0.0) * 10.0
    positions = rope(facts, rotated=sizes["qk_rope_head_dim"])
    if positions["rope_type"] == "yarn" and multiplier:
        positions |= {"mscale": multiplier, "mscale_all_dim": multiplier}
    config = sizes | routed | {"rope_parameters": positions, "n_shared_experts": routed["n_shared_experts"] or 0}
    # Files that were written before that key say it by the correction that V3 alone has.
    corrected = facts.has("blk.*.exp_probs_b.bias") or facts.has("blk.*.exp_probs_b")
    if facts.number("expert_gating_func", SIGMOID if corrected else SOFTMAX) == SIGMOID:
        return config | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    groups, used = config.pop("n_group"), config.pop("topk_group")
    grouped = {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": used} if groups > 1 else {}
    return config | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], **grouped}


def _glm4_moe(facts: GgufFacts) -> dict[str, Any]:
    facts.get("rope.dimension_sections")  # of pictures
    return _routed(facts, norm=True) | {
        "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": facts.has_qkv_biases(), "use_qk_norm": facts.has("blk.0.attn_q_norm.weight"),
    }  # fmt: skip


def _dots1(facts: GgufFacts) -> dict[str, Any]:
    return _routed(facts) | {
        "model_type": "dots1", "architectures": ["Dots1ForCausalLM"], "sliding_window": None,
        "layer_types": ["full_attention"] * facts.num_layers(),
    }  # fmt: skip


def _ernie(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    with_experts = sorted(facts.layers_with("ffn_gate_inp."))
    step = facts.size("interleave_moe_layer_step", 1)
    first, last = with_experts[0], with_experts[-1]
    if with_experts != [layer for layer in range(first, last + 1) if (layer + 1) % step == 0]:
        raise UnsupportedModelError(
            f"the GGUF file has experts in layers {with_experts[:8]}, and says every {step} from {first} to {last}"
        )
    shared = "blk.*.ffn_gate_shexp.weight"
    return {
        "model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"], "moe_num_experts": num_experts,
        "moe_intermediate_size": width, "moe_k": facts.size("expert_used_count"), "moe_layer_interval": step,
        "moe_layer_start_index": first, "moe_layer_end_index": last, "use_bias": False,
        "moe_num_shared_experts": facts.rows(shared) // width if facts.has(shared) else 0,
    }  # fmt: skip


def _hunyuan(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    shared = facts.rows("blk.*.ffn_gate_shexp.weight")
    if shared != width:
        raise UnsupportedModelError(f"the GGUF file has a shared expert of {shared} rows beside experts of {width}")
    return {
        "model_type": "hunyuan_v1_moe", "architectures": ["HunYuanMoEV1ForCausalLM"], "num_experts": num_experts,
        "moe_topk": facts.size("expert_used_count"), "intermediate_size": width,
    }  # fmt: skip


def _bailing2(facts: GgufFacts) -> dict[str, Any]:
    """Ling 2: GLM-4.5's layers with norms of queries and keys, which transformers has."""
    return _glm4_moe(facts) | {"use_qk_norm": True}


_GLM = Architecture(
    config=_glm4_moe, modules=ATTENTION | QK_NORMS | FFN_NORM | POST_ATTENTION_NORM | _ROUTED, parameters=_CORRECTION,
    experts=experts_of("mlp.experts"), biased=QKV, gating=(0, SIGMOID), is_partial=True,
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "deepseek2": Architecture(
        config=_deepseek, modules=LATENT | FFN_NORM | _ROUTED, parameters=_CORRECTION,
        experts=experts_of("mlp.experts"), joins=LATENT_JOINS,
    ),
    "glm4moe": _GLM,
    "bailingmoe2": Architecture(
        config=_bailing2,
        modules=ATTENTION | QK_NORMS | FFN_NORM | _ROUTED,
        experts=experts_of("mlp.experts"), gating=(SIGMOID,), parameters=_CORRECTION, is_partial=True,
    ),
    "dots1": Architecture(
        config=_dots1, modules=ATTENTION | QK_NORMS | FFN_NORM | _ROUTED, parameters=_CORRECTION,
        experts=experts_of("mlp.experts"), gating=(0, SIGMOID),
    ),
    "ernie4_5-moe": Architecture(
        config=_ernie, modules=ATTENTION | FFN_NORM | _ROUTED, experts=experts_of("mlp.experts"),
        parameters=dict.fromkeys(("exp_probs_b.bias", "exp_probs_b"), "mlp.moe_statics.e_score_correction_bias"),
        undo=dict.fromkeys(("exp_probs_b.bias", "exp_probs_b"), as_row), norm=(True,),
    ),
    "hunyuan-moe": Architecture(
        config=_hunyuan,
        modules=ATTENTION | FFN_NORM | mlp("mlp.shared_mlp", "_shexp") | {
            "ffn_gate_inp": "mlp.gate.wg", "attn_q_norm": "self_attn.query_layernorm",
            "attn_k_norm": "self_attn.key_layernorm",
        },
        experts=experts_of("mlp.experts"), norm=(True,),
    ),
}  # fmt: skip
