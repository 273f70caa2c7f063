"""GGUF architectures that have layers without attention: gated delta nets, short convolutions. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.derived import DerivationStep, DerivedEntry, StoredTensor
from offmoe.checkpoint.gguf.architecture import (
    ATTENTION,
    FFN_NORM,
    LATENT,
    LATENT_JOINS,
    MIXTRAL_EXPERTS,
    POST_ATTENTION_NORM,
    QK_NORMS,
    SIGMOID,
    Architecture,
    Stored,
    Undo,
    as_convolution,
    as_row,
    derived,
    experts_of,
    less_one,
    logarithm,
    mlp,
)
from offmoe.checkpoint.gguf.facts import GgufFacts
from offmoe.checkpoint.gguf.sigmoid import latent_sizes
from offmoe.core.errors import CheckpointError


def _delta_net(facts: GgufFacts) -> dict[str, Any]:
    """Sizes of Qwen's gated delta nets, and which layers have them."""
    facts.get("full_attention_interval")
    facts.get("attention.recurrent_layers")
    num_experts, width = facts.experts()
    value_heads, inner = facts.size("ssm.time_step_rank"), facts.size("ssm.inner_size")
    groups = facts.size("ssm.group_count")
    linear, num_layers = facts.layers_with("ssm_out."), facts.num_layers()
    if inner % value_heads or value_heads % groups:
        raise CheckpointError(
            f"the GGUF file says {inner} values in {value_heads} heads of {groups} groups, which do not divide "
            "each other"
        )
    return {
        "num_experts": num_experts, "moe_intermediate_size": width,
        "shared_expert_intermediate_size": facts.rows("blk.*.ffn_gate_shexp.weight"),
        "linear_conv_kernel_dim": facts.size("ssm.conv_kernel"), "linear_key_head_dim": facts.size("ssm.state_size"),
        "linear_num_key_heads": groups, "linear_num_value_heads": value_heads,
        "linear_value_head_dim": inner // value_heads,
        "layer_types": ["linear_attention" if layer in linear else "full_attention" for layer in range(num_layers)],
    }  # fmt: skip


def _qwen3_next(facts: GgufFacts) -> dict[str, Any]:
    return _delta_net(facts) | {
        "model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip


def _qwen3_5_moe(facts: GgufFacts) -> dict[str, Any]:
    facts.get("rope.dimension_sections")  # of pictures: text has one kind of positions
    return _delta_net(facts) | {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]}


def _lfm2_moe(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    num_layers, convolutions = facts.num_layers(), facts.layers_with("shortconv.")
    dense = set(range(num_layers)) - facts.layers_with("ffn_gate_inp.")
    return {
        "model_type": "lfm2_moe", "architectures": ["Lfm2MoeForCausalLM"], "num_experts": num_experts,
        "moe_intermediate_size": width, "norm_eps": facts.positive("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": facts.size("shortconv.l_cache"), "num_dense_layers": len(dense), "norm_topk_prob": True,
        "use_expert_bias": facts.has("blk.*.exp_probs_b.bias"), "conv_bias": False,
        "layer_types": ["conv" if layer in convolutions else "full_attention" for layer in range(num_layers)],
    }  # fmt: skip


def _kimi_linear(facts: GgufFacts) -> dict[str, Any]:
    num_experts, width = facts.experts()
    num_layers, linear = facts.num_layers(), facts.layers_with("ssm_a")
    with_experts, groups = facts.layers_with("ffn_gate_inp."), max(1, facts.number("expert_group_count", 0))
    shared, head = "blk.*.ffn_gate_shexp.weight", facts.size("kda.head_dim")
    return latent_sizes(facts) | {
        "model_type": "kimi_linear", "architectures": ["KimiLinearForCausalLM"], "num_experts": num_experts,
        "moe_intermediate_size": width, "num_experts_per_token": facts.size("expert_used_count"),
        "num_shared_experts": facts.rows(shared) // width if facts.has(shared) else 0,
        "routed_scaling_factor": facts.real("expert_weights_scale", 1.0) or 1.0, "moe_renormalize": True,
        "num_expert_group": groups, "topk_group": min(groups, max(1, facts.number("expert_group_used_count", 0))),
        "linear_head_dim": head, "linear_num_heads": math.prod(facts.find("blk.*.ssm_a")),
        "linear_conv_kernel_dim": facts.size("ssm.conv_kernel"), "model_max_length": facts.size("context_length"),
        "mlp_layer_types": ["sparse" if layer in with_experts else "dense" for layer in range(num_layers)],
        "layer_types": ["linear_attention" if layer in linear else "full_attention" for layer in range(num_layers)],
    }  # fmt: skip


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """(groups of value heads, heads of a group)."""
    groups = config["linear_num_key_heads"]
    return groups, config["linear_num_value_heads"] // groups


def _ungrouped(name: str, sources: tuple[Stored, ...], config: Mapping[str, Any]) -> StoredTensor:
    """in_proj_qkvz: q, k, v and z of the first group of heads, then those of the second; stored q, k, v | z."""
    groups, of_a_group = _heads(config)
    key, value = config["linear_key_head_dim"] * groups, config["linear_value_head_dim"] * groups * of_a_group
    qkv, z = sources
    if qkv.shape[0] != 2 * key + value or z.shape[0] != value:
        raise CheckpointError(
            f"{qkv.name!r} has {qkv.shape[0]} rows and {z.name!r} {z.shape[0]}, the metadata say {2 * key + value} and "
            f"{value}; get another conversion of the model"
        )
    shape = (qkv.shape[0] + z.shape[0], qkv.shape[1])
    return DerivedEntry(
        name=name, shape=shape, steps=(DerivationStep("ungroup", (groups, key, key, value)),), sources=sources
    )


def _untiled(axis: int, *, is_value: bool, has_keys: bool = False, after: Undo | None = None) -> Undo:
    """Value heads in the order of their key heads, where llama.cpp wants the first of every group first."""

    def undo(entry: Stored, config: Mapping[str, Any]) -> StoredTensor:
        groups, of_a_group = _heads(config)
        first = 2 * groups * config["linear_key_head_dim"] if has_keys else 0
        size = config["linear_value_head_dim"] if is_value else 1
        step = DerivationStep("untile", (axis, first, groups, of_a_group, size))
        later = after(entry, config) if after else None
        steps, shape = (later.steps, later.shape) if isinstance(later, DerivedEntry) else ((), entry.shape)
        return derived(entry, step, *steps, shape=shape)

    return undo


def _kimi_decay(entry: Stored, config: Mapping[str, Any]) -> StoredTensor:
    return derived(entry, DerivationStep("log"), shape=(1, 1, math.prod(entry.shape), 1))


_QWEN = ATTENTION | QK_NORMS | POST_ATTENTION_NORM | mlp("mlp.shared_expert", "_shexp") | {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm", "ssm_out": "linear_attn.out_proj",
}  # fmt: skip
_QWEN_PARAMETERS = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
_QWEN_UNDO: dict[str, Undo] = dict.fromkeys(
    ("attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm", "output_norm"), less_one
) | {"ffn_gate_inp_shexp": as_row}

ARCHITECTURES: dict[str, Architecture] = {
    "qwen3next": Architecture(
        config=_qwen3_next,
        modules=_QWEN | {"ssm_in": "linear_attn.in_proj_qkvz", "ssm_ba": "linear_attn.in_proj_ba"},
        parameters=_QWEN_PARAMETERS, experts=experts_of("mlp.experts"),
        undo=_QWEN_UNDO | {"ssm_conv1d": as_convolution, "ssm_a": logarithm},
        joins={("attn_qkv.weight", "attn_gate.weight"): ("linear_attn.in_proj_qkvz.weight", _ungrouped)},
        norm=(True,), is_partial=True,
    ),
    "qwen35moe": Architecture(
        config=_qwen3_5_moe,
        modules=_QWEN | {
            "attn_qkv": "linear_attn.in_proj_qkv", "attn_gate": "linear_attn.in_proj_z",
            "ssm_beta": "linear_attn.in_proj_b", "ssm_alpha": "linear_attn.in_proj_a",
        },
        parameters=_QWEN_PARAMETERS, experts=experts_of("mlp.experts"),
        undo=_QWEN_UNDO | {
            "ssm_conv1d": _untiled(0, is_value=True, has_keys=True, after=as_convolution),
            "ssm_a": _untiled(0, is_value=False, after=logarithm), "ssm_dt.bias": _untiled(0, is_value=False),
            "attn_qkv": _untiled(0, is_value=True, has_keys=True), "attn_gate": _untiled(0, is_value=True),
            "ssm_beta": _untiled(0, is_value=False), "ssm_alpha": _untiled(0, is_value=False),
            "ssm_out": _untiled(1, is_value=True),
        },
        norm=(True,), is_partial=True,
    ),
    "lfm2moe": Architecture(
        config=_lfm2_moe,
        outside={"token_embd": "model.embed_tokens", "output": "lm_head"}
        | dict.fromkeys(("token_embd_norm", "output_norm"), "model.embedding_norm"),
        modules={
            "attn_norm": "operator_norm", "ffn_norm": "ffn_norm", "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.out_proj",
            "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm",
            "shortconv.conv": "conv.conv", "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj",
            "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2",
            "ffn_gate_inp": "feed_forward.gate",
        },
        parameters=dict.fromkeys(("exp_probs_b.bias", "exp_probs_b"), "feed_forward.expert_bias"),
        experts={part: name.replace("block_sparse_moe", "feed_forward") for part, name in MIXTRAL_EXPERTS.items()},
        undo={"shortconv.conv": as_convolution}, gating=(SIGMOID,), norm=(True,),
    ),
    "kimi-linear": Architecture(
        config=_kimi_linear,
        modules=ATTENTION | LATENT | FFN_NORM | mlp("block_sparse_moe")
        | mlp("block_sparse_moe.shared_experts", "_shexp") | {
            "ffn_gate_inp": "block_sparse_moe.gate", "ssm_conv1d_q": "self_attn.q_conv1d",
            "ssm_conv1d_k": "self_attn.k_conv1d", "ssm_conv1d_v": "self_attn.v_conv1d",
            "ssm_f_a": "self_attn.f_a_proj", "ssm_f_b": "self_attn.f_b_proj", "ssm_g_a": "self_attn.g_a_proj",
            "ssm_g_b": "self_attn.g_b_proj", "ssm_beta": "self_attn.b_proj", "ssm_norm": "self_attn.o_norm",
        },
        parameters={"ssm_a": "self_attn.A_log", "ssm_dt.bias": "self_attn.dt_bias"}
        | dict.fromkeys(("exp_probs_b.bias", "exp_probs_b"), "block_sparse_moe.gate.e_score_correction_bias"),
        experts=MIXTRAL_EXPERTS, joins=LATENT_JOINS,
        undo=dict.fromkeys(("ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v"), as_convolution) | {"ssm_a": _kimi_decay},
        gating=(0, SIGMOID), norm=(True,),
    ),
}  # fmt: skip
