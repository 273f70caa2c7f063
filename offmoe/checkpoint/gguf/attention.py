"""GGUF architectures whose layers are attention with grouped queries and softmax routing. No torch."""

from __future__ import annotations

from typing import Any

from offmoe.checkpoint.gguf.architecture import (
    ATTENTION,
    FFN_NORM,
    MIXTRAL_EXPERTS,
    POST_ATTENTION_NORM,
    QK_NORMS,
    QKV,
    SIGMOID,
    SOFTMAX_OF_CHOSEN,
    Architecture,
    Join,
    as_row,
    experts_of,
    mlp,
    pairs,
    rows,
    stacked_of,
    unrotate,
)
from offmoe.checkpoint.gguf.facts import GgufFacts
from offmoe.checkpoint.gguf.rope import rope
from offmoe.core.errors import UnsupportedModelError

_UNROTATED = {"attn_q": unrotate, "attn_k": unrotate}


def _mixtral(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    return {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": num_experts,
        "sliding_window": facts.number("attention.sliding_window", 0) or None, "intermediate_size": width,
    }  # fmt: skip


def _qwen2_moe(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    return {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_experts": num_experts,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": facts.rows("blk.*.ffn_gate_shexp.weight"), "norm_topk_prob": False,
        "qkv_bias": facts.has_qkv_biases(),
    }  # fmt: skip


def _qwen3_moe(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    return {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": num_experts,
        "moe_intermediate_size": width, "norm_topk_prob": True,
    }  # fmt: skip


def _qwen3_vl_moe(facts: GgufFacts) -> dict[str, Any]:
    """The language model. With text alone its three kinds of positions are one, and early layers get nothing added."""
    facts.get("rope.dimension_sections")
    facts.get("n_deepstack_layers")
    return _qwen3_moe(facts)


def _olmoe(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    return {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "num_experts": num_experts,
        "intermediate_size": width, "norm_topk_prob": False,
        "clip_qkv": facts.real("attention.clamp_kqv", 0.0) or None,
    }  # fmt: skip


def _gpt_oss(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    positions = rope(facts, rotated=facts.size("attention.key_length"))
    if positions["rope_type"] == "yarn":
        positions["truncate"] = False
    return {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_local_experts": num_experts,
        "intermediate_size": width, "rope_parameters": positions,
        "sliding_window": facts.number("attention.sliding_window"),
    }  # fmt: skip


def _granite(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    head = facts.size("attention.key_length", facts.size("embedding_length") // facts.size("attention.head_count"))
    config = {
        "model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"], "num_local_experts": num_experts,
        "intermediate_size": width, "embedding_multiplier": facts.real("embedding_scale", 1.0) or 1.0,
        "residual_multiplier": facts.real("residual_scale", 1.0) or 1.0,
        "attention_multiplier": facts.real("attention.scale", 0.0) or head**-0.5,
        "logits_scaling": facts.positive("logit_scale", 1.0),
    }  # fmt: skip
    return config | _shared_granite(facts)


def _shared_granite(facts: GgufFacts) -> dict[str, Any]:
    if not facts.has("blk.*.ffn_gate_shexp.weight"):
        return {}
    return {
        "model_type": "granitemoeshared", "architectures": ["GraniteMoeSharedForCausalLM"],
        "shared_intermediate_size": facts.rows("blk.*.ffn_gate_shexp.weight"),
    }  # fmt: skip


def _bailing(facts: GgufFacts) -> dict[str, Any]:
    """Ling 1: the same sums as Granite's with a shared expert and multipliers of 1, which transformers has."""
    facts.expect("expert_weights_norm", True)
    head = facts.size("attention.key_length", facts.size("embedding_length") // facts.size("attention.head_count"))
    num_experts, width = facts.experts()
    return {
        "num_local_experts": num_experts, "intermediate_size": width, "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0, "attention_multiplier": head**-0.5, "logits_scaling": 1.0,
        "model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"],
    } | _shared_granite(facts)  # fmt: skip


def _minimax_m2(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    return {
        "model_type": "minimax_m2", "architectures": ["MiniMaxM2ForCausalLM"], "num_local_experts": num_experts,
        "intermediate_size": width,
    }  # fmt: skip


def _phimoe(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    head = facts.size("embedding_length") // facts.size("attention.head_count")
    positions = rope(facts, rotated=head)
    if positions["rope_type"] == "longrope":
        positions |= dict.fromkeys(("short_mscale", "long_mscale"), positions["attention_factor"])
    window, context = facts.number("attention.sliding_window", 0), facts.size("context_length")
    return {
        "model_type": "phimoe", "architectures": ["PhimoeForCausalLM"], "num_local_experts": num_experts,
        "intermediate_size": width, "rope_parameters": positions, "attention_bias": facts.has_qkv_biases(),
        "lm_head_bias": facts.has("output.bias"), "sliding_window": window if 0 < window < context else None,
    }  # fmt: skip


def _dbrx(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    heads = facts.size("attention.head_count")
    eps = facts.get("attention.layer_norm_epsilon", 1e-5)
    if abs(eps - 1e-5) > 1e-9:
        raise UnsupportedModelError(f"the GGUF file says attention.layer_norm_epsilon {eps!r}; 1e-05 is dbrx's")
    return {
        "model_type": "dbrx", "architectures": ["DbrxForCausalLM"], "d_model": facts.size("embedding_length"),
        "n_heads": heads, "n_layers": facts.num_layers(), "max_seq_len": facts.size("context_length"),
        "vocab_size": facts.rows("token_embd.weight"), "tie_word_embeddings": not facts.has("output.weight"),
        "rope_parameters": rope(facts, rotated=facts.size("embedding_length") // heads),
        "attn_config": {
            "kv_n_heads": facts.size("attention.head_count_kv", heads),
            "clip_qkv": facts.real("attention.clamp_kqv", 0.0) or None,
            "rope_theta": facts.positive("rope.freq_base", 10000.0),
        },
        "ffn_config": {
            "hidden_size": facts.size("embedding_length"), "ffn_hidden_size": width, "moe_num_experts": num_experts,
            "moe_top_k": facts.size("expert_used_count"), "moe_normalize_expert_weights": 1.0,
            "ffn_act_fn": {"name": "silu"},
        },
    }  # fmt: skip


def _grok(facts: GgufFacts) -> dict[str, Any]:
    """Grok-1. Defaults are those of files that were written before the keys were there."""
    if facts.has("blk.*.ffn_gate.weight"):
        raise UnsupportedModelError("the GGUF file holds Grok-2, whose layers have a dense part too; Grok-1 is read")
    num_experts, width = facts.experts()
    cap = facts.positive("attn_logit_softcapping", 30.0)
    facts.expect("router_logit_softcapping", 30.0)  # written, and used by nobody
    return {
        "model_type": "grok-1", "architectures": ["Grok1ForCausalLM"], "num_experts": num_experts,
        "intermediate_size": width, "max_attn_value": cap, "rope_theta": facts.positive("rope.freq_base", 10000.0),
        "attn_output_multiplier": facts.positive("attention.output_scale", 0.08838834764831845),
        "embedding_multiplier_scale": facts.positive("embedding_scale", 78.38367176906169),
        "output_multiplier_scale": facts.positive("logit_scale", 0.5773502691896257),
        "hidden_size": facts.size("embedding_length"), "vocab_size": facts.rows("token_embd.weight"),
        "num_hidden_layers": facts.num_layers(), "num_attention_heads": facts.size("attention.head_count"),
        "num_key_value_heads": facts.size("attention.head_count_kv"),
        "max_position_embeddings": facts.size("context_length"), "tie_word_embeddings": not facts.has("output.weight"),
        "rms_norm_eps": facts.positive("attention.layer_norm_rms_epsilon"),
        "num_experts_per_tok": facts.size("expert_used_count"),
    }  # fmt: skip


def _llama4(facts: GgufFacts) -> dict[str, Any]:
    """llama.cpp has the chunks, the temperature and the layers without positions in its code, not in its files."""
    num_experts, width = facts.experts()
    num_layers, with_experts = facts.num_layers(), facts.layers_with("ffn_gate_inp.")
    dense = "blk.*.ffn_gate.weight"
    window = facts.number("attention.sliding_window", 8192)
    return {
        "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "num_local_experts": num_experts,
        "intermediate_size": width, "intermediate_size_mlp": facts.rows(dense) if facts.has(dense) else width,
        "moe_layers": sorted(with_experts), "use_qk_norm": num_experts != 128, "attention_chunk_size": 8192,
        "no_rope_layers": [1 if window == 0 else int((layer + 1) % 4 != 0) for layer in range(num_layers)],
        "layer_types": [
            "full_attention" if window == 0 or (layer + 1) % 4 == 0 else "chunked_attention"
            for layer in range(num_layers)
        ],
        "attn_temperature_tuning": window != 0, "floor_scale": 8192, "attn_scale": 0.1,
    }  # fmt: skip


_PHI_NAMES = ATTENTION | FFN_NORM | {"ffn_gate_inp": "block_sparse_moe.gate"}
_SHARED_GRANITE: dict[tuple[str, ...], tuple[str, Join]] = {
    ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"): ("shared_mlp.input_linear.weight", rows),
}
_GRANITE_NAMES = ATTENTION | FFN_NORM | {
    "ffn_gate_inp": "block_sparse_moe.router.layer", "ffn_down_shexp": "shared_mlp.output_linear",
}  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        config=_mixtral, modules=ATTENTION | FFN_NORM | {"ffn_gate_inp": "block_sparse_moe.gate"},
        experts=MIXTRAL_EXPERTS, undo=_UNROTATED, norm=(True,),
    ),
    "qwen2moe": Architecture(
        config=_qwen2_moe,
        modules=ATTENTION | FFN_NORM | mlp("mlp") | mlp("mlp.shared_expert", "_shexp")
        | {"ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
        experts=experts_of("mlp.experts"), undo={"ffn_gate_inp_shexp": as_row}, biased=QKV, norm=(False,),
    ),
    "qwen3moe": Architecture(
        config=_qwen3_moe, modules=ATTENTION | QK_NORMS | FFN_NORM | mlp("mlp") | {"ffn_gate_inp": "mlp.gate"},
        experts=experts_of("mlp.experts"), norm=(True,),
    ),
    "qwen3vlmoe": Architecture(
        config=_qwen3_vl_moe, modules=ATTENTION | QK_NORMS | FFN_NORM | {"ffn_gate_inp": "mlp.gate"},
        experts=experts_of("mlp.experts"), norm=(True,),
    ),
    "olmoe": Architecture(
        config=_olmoe, modules=ATTENTION | QK_NORMS | FFN_NORM | {"ffn_gate_inp": "mlp.gate"},
        experts=experts_of("mlp.experts"), norm=(False,),
    ),
    "gpt-oss": Architecture(
        config=_gpt_oss, modules=ATTENTION | FFN_NORM | POST_ATTENTION_NORM | {"ffn_gate_inp": "mlp.router"},
        stacked={part: f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")},
        parameters={
            "attn_sinks.weight": "self_attn.sinks", "attn_sinks": "self_attn.sinks",
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        },
        joins={("ffn_gate_exps.bias", "ffn_up_exps.bias"): ("mlp.experts.gate_up_proj_bias", pairs)},
        biased=QKV | {"attn_output", "ffn_gate_inp"}, gating=(0, SOFTMAX_OF_CHOSEN),
    ),
    "granitemoe": Architecture(
        config=_granite, modules=_GRANITE_NAMES, stacked=stacked_of("block_sparse_moe.experts"), joins=_SHARED_GRANITE,
        undo=_UNROTATED, norm=(True,),
    ),
    "bailingmoe": Architecture(
        config=_bailing, modules=_GRANITE_NAMES, stacked=stacked_of("block_sparse_moe.experts"), joins=_SHARED_GRANITE,
        undo=_UNROTATED,
    ),
    "minimax-m2": Architecture(
        config=_minimax_m2, modules=ATTENTION | QK_NORMS | FFN_NORM | {"ffn_gate_inp": "block_sparse_moe.gate"},
        experts=MIXTRAL_EXPERTS, gating=(0, SIGMOID), norm=(True,), is_partial=True,
        parameters=dict.fromkeys(("exp_probs_b.bias", "exp_probs_b"), "block_sparse_moe.e_score_correction_bias"),
    ),
    "phimoe": Architecture(
        config=_phimoe, modules=_PHI_NAMES, experts=MIXTRAL_EXPERTS,
        biased=frozenset({*_PHI_NAMES, "output", "output_norm"}) - {"ffn_gate_inp"},
    ),
    "dbrx": Architecture(
        config=_dbrx, layer="transformer.blocks.",
        outside={"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"},
        modules={
            "attn_norm": "norm_attn_norm.norm_1", "attn_output_norm": "norm_attn_norm.norm_2",
            "attn_qkv": "norm_attn_norm.attn.Wqkv", "attn_output": "norm_attn_norm.attn.out_proj",
            "ffn_gate_inp": "ffn.router.layer",
        },
        stacked=stacked_of("ffn.experts"), norm=(True,), is_whole=True,
    ),
    "grok": Architecture(
        config=_grok,
        outside={"token_embd": "model.embed_tokens", "output_norm.weight": "model.norm.scale", "output": "lm_head"},
        parameters={
            "attn_norm.weight": "pre_attn_norm.scale", "attn_output_norm.weight": "post_attn_norm.scale",
            "ffn_norm.weight": "pre_moe_norm.scale", "layer_output_norm.weight": "post_moe_norm.scale",
            "post_ffw_norm.weight": "post_moe_norm.scale",
        },
        modules={
            "ffn_gate_inp": "moe_block.gate", "attn_q": "attn.q_proj", "attn_k": "attn.k_proj", "attn_v": "attn.v_proj",
            "attn_output": "attn.o_proj",
        },
        experts={
            part: f"moe_block.experts.*.{name}.weight"
            for part, name in (("gate", "linear"), ("up", "linear_v"), ("down", "linear_1"))
        }, norm=(False,), is_whole=True,
    ),
    "llama4": Architecture(
        config=_llama4,
        modules=ATTENTION | FFN_NORM | mlp("feed_forward") | mlp("feed_forward.shared_expert", "_shexp")
        | {"ffn_gate_inp": "feed_forward.router"},
        stacked=stacked_of("feed_forward.experts"), gating=(0, SIGMOID), norm=(False,),
    ),
}  # fmt: skip
