"""A tiny real model of every family that transformers routes through its experts door, alone and inside other models.

Each `Family` is a config of the family's own class, small enough to run in milliseconds, and wide enough to be wrong in
a visible way: expert width differs from model width, weights are spread so that a wrong expert, a wrong layer or a
swapped half moves the logits, biases and attention sinks are not zero. `build` makes the model, `save_layout` writes it
in the forms a checkpoint is found in. Nothing here knows offmoe: these are the models it is measured against.
"""

from __future__ import annotations

import copy
import importlib
import math
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

Layout = Literal["published", "stacked", "shards"]

LAYOUTS: tuple[Layout, ...] = ("published", "stacked", "shards")

_SHARD_SIZE = "20KB"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: the transformers folder, the class of its causal text model, and the overrides that make it tiny."""

    name: str
    model_class: str
    config_class: str
    config: dict[str, object] = field(repr=False)
    notes: str = ""
    # Name of a module -> factor on the standard deviation of its random matrix.
    gains: dict[str, float] = field(default_factory=dict, repr=False)
    # The hub stores the stacked experts transposed. transformers turns them on load and never writes them so.
    published_transposed: bool = False


# Four heads of 12 on a width of 48. Families that name a head size get 16, so that attention is not square either.
_BASE: dict[str, object] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

# Multi-head latent attention (DeepSeek): every head has its own key, and sizes that all differ.
_MLA: dict[str, object] = {
    **_BASE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}


def _family(
    name: str,
    prefix: str,
    base: dict[str, object],
    *,
    notes: str = "",
    gains: dict[str, float] | None = None,
    **overrides: object,
) -> Family:
    return Family(
        name=name,
        model_class=f"{prefix}ForCausalLM",
        config_class=f"{prefix}Config",
        config={**base, **overrides},
        notes=notes,
        gains=gains or {},
    )


_MOE: dict[str, object] = {"moe_intermediate_size": 20, "num_experts": 8, "num_experts_per_tok": 2}

# DeepSeek's words for the same, with expert groups: two of four groups of two are eligible for a token.
_ROUTED: dict[str, object] = {
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
}

# DeepSeek's sparse attention: each query keeps 8 keys, fewer than the tests' prompts have. Its scores are sums of ReLUs
# over the heads; with two heads a quarter of them tie at zero, and the choice among ties is not the model's.
_DSA: dict[str, object] = {**_MLA, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 8}

_GATED_DELTA: dict[str, object] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}

_GRANITE: dict[str, object] = {
    **_BASE,
    "intermediate_size": 20,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    "tie_word_embeddings": True,
}

_DENSE_FIRST = ["dense", "sparse", "sparse"]
_FULL_SLIDING = ["full_attention", "sliding_attention", "full_attention"]
_LINEAR_FULL = ["linear_attention", "full_attention", "linear_attention", "full_attention"]

_ALL = (
    _family(
        "afmoe",
        "Afmoe",
        _BASE | _MOE,
        head_dim=16,
        intermediate_size=40,
        num_dense_layers=1,
        num_shared_experts=2,
        route_scale=1.5,
        mup_enabled=True,
        gains={"embed_tokens": 0.3},  # the family multiplies them by the root of the width
        sliding_window=8,
        layer_types=_FULL_SLIDING,
    ),
    _family(
        "aria",
        "AriaText",
        _BASE,
        intermediate_size=20,
        moe_num_experts=8,
        moe_topk=2,
        moe_num_shared_experts=2,
        notes="text tower of the vision-language model",
    ),
    _family("axk1", "AXK1", _MLA | _ROUTED, mlp_layer_types=_DENSE_FIRST),
    _family("axk2", "AXK2", _DSA | _ROUTED, mlp_layer_types=_DENSE_FIRST, gated_norm_rank=6),
    _family(
        "bailing_hybrid",
        "BailingHybrid",
        _MLA | _ROUTED,
        num_hidden_layers=4,
        layer_types=_LINEAR_FULL,
        first_k_dense_replace=1,
        num_local_experts=8,
        head_dim=12,
    ),
    _family(
        "beam",
        "Beam",
        _BASE | _MOE,
        head_dim=16,
        intermediate_size=40,
        n_group=4,
        topk_group=2,
        sliding_window=8,
        layer_types=_FULL_SLIDING,
        mlp_layer_types=_DENSE_FIRST,
    ),
    _family(
        "cohere2_moe",
        "Cohere2Moe",
        _BASE,
        head_dim=16,
        intermediate_size=20,
        prefix_dense_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=2,
        expert_selection_fn="sigmoid",
        sliding_window=8,
        layer_types=_FULL_SLIDING,
        mlp_layer_types=_DENSE_FIRST,
        tie_word_embeddings=True,
    ),
    _family(
        "deepseek_v2",
        "DeepseekV2",
        _MLA | _ROUTED,
        first_k_dense_replace=1,
        n_shared_experts=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.5,
    ),
    _family("deepseek_v3", "DeepseekV3", _MLA | _ROUTED, first_k_dense_replace=1),
    _family("deepseek_v32", "DeepseekV32", _DSA | _ROUTED, first_k_dense_replace=1),
    _family(
        "deepseek_v4",
        "DeepseekV4",
        _BASE,
        num_hidden_layers=4,
        num_key_value_heads=1,
        head_dim=16,
        q_lora_rank=24,
        moe_intermediate_size=20,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        layer_types=[
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
            "compressed_sparse_attention",
        ],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
        partial_rotary_factor=0.5,
        hc_mult=2,
        hc_sinkhorn_iters=4,
        sliding_window=8,
        o_groups=2,
        o_lora_rank=12,
        index_n_heads=8,
        index_head_dim=16,
        index_topk=4,
        swiglu_limit=1.0,
    ),
    _family(
        "dots1",
        "Dots1",
        _BASE | _ROUTED,
        head_dim=16,
        first_k_dense_replace=1,
        n_shared_experts=2,
        norm_topk_prob=True,
        sliding_window=8,
        layer_types=_FULL_SLIDING,
    ),
    Family(
        name="dots3_note",
        model_class="Dots3NoteForCausalLM",
        config_class="Dots3NoteTextConfig",
        config={
            **_DSA,
            **_ROUTED,
            "head_dim": 20,
            "mlp_layer_types": _DENSE_FIRST,
            "shared_experts_intermediate_size": 28,
            "sliding_window": 8,
            "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 20,
            "swa_kv_lora_rank": 18,
            "swa_head_dim": 24,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 14,
        },
    ),
    _family(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        _BASE,
        intermediate_size=40,
        moe_intermediate_size=20,
        moe_num_experts=8,
        moe_num_shared_experts=2,
        moe_k=2,
        moe_layer_start_index=1,
        tie_word_embeddings=True,
    ),
    _family(
        "exaone_moe",
        "ExaoneMoe",
        _BASE | _MOE,
        head_dim=16,
        intermediate_size=40,
        num_shared_experts=1,
        n_group=4,
        topk_group=2,
        sliding_window=8,
        layer_types=_FULL_SLIDING,
        mlp_layer_types=_DENSE_FIRST,
    ),
    _family("flex_olmo", "FlexOlmo", _BASE, intermediate_size=20, num_experts=7, num_experts_per_tok=2),
    _family(
        "flint",
        "Flint",
        _BASE | _MOE,
        head_dim=16,
        intermediate_size=40,
        shared_expert_intermediate_size=28,
        mlp_only_layers=[0],
        sliding_window=8,
        layer_types=_FULL_SLIDING,
    ),
    Family(
        name="gemma4",
        model_class="Gemma4ForCausalLM",
        config_class="Gemma4TextConfig",
        config={
            **_BASE,
            "head_dim": 12,
            "global_head_dim": 16,
            "intermediate_size": 40,
            "moe_intermediate_size": 20,
            "num_experts": 8,
            "top_k_experts": 2,
            "enable_moe_block": True,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 10,
            "sliding_window": 8,
            "layer_types": _FULL_SLIDING,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
        notes="text tower; a dense MLP runs beside the experts in every layer",
    ),
    _family(
        "glm4_moe",
        "Glm4Moe",
        _BASE | _ROUTED,
        head_dim=16,
        first_k_dense_replace=1,
        use_qk_norm=True,
        attention_bias=True,
        routed_scaling_factor=1.5,
    ),
    _family("glm4_moe_lite", "Glm4MoeLite", _MLA | _ROUTED, mlp_layer_types=_DENSE_FIRST),
    _family(
        "glm_moe_dsa",
        "GlmMoeDsa",
        _DSA | _ROUTED,
        first_k_dense_replace=1,
        indexer_types=["full", "shared", "full"],
    ),
    _family(
        "gpt_oss",
        "GptOss",
        _BASE,
        head_dim=16,
        intermediate_size=20,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
    ),
    _family("granitemoe", "GraniteMoe", _GRANITE),
    _family(
        "granitemoe_swa",
        "GraniteMoeSWA",
        _GRANITE,
        shared_intermediate_size=28,
        sliding_window=8,
        layer_types=_FULL_SLIDING,
        layer_rope_theta=[0.0, 10000.0, 10000.0],
    ),
    _family(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        _GRANITE,
        shared_intermediate_size=28,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        position_embedding_type="rope",
        mamba_n_heads=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    _family("granitemoeshared", "GraniteMoeShared", _GRANITE, shared_intermediate_size=28),
    _family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1",
        _BASE,
        head_dim=16,
        intermediate_size=20,
        num_experts=8,
        moe_topk=2,
    ),
    _family(
        "hy_v3",
        "HYV3",
        _BASE | _MOE,
        head_dim=16,
        intermediate_size=40,
        num_shared_experts=1,
        mlp_layer_types=_DENSE_FIRST,
    ),
    _family(
        "hy_v4",
        "HYV4",
        _DSA | _ROUTED,
        mlp_layer_types=_DENSE_FIRST,
        indexer_types=["full", "shared", "full"],
        hc_mult=2,
        swiglu_limit=1.0,
    ),
    Family(
        name="inkling",
        model_class="InklingForCausalLM",
        config_class="InklingTextConfig",
        config={
            **_BASE,
            "head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 12,
            "sliding_window_size": 8,
            "d_rel": 6,
            "rel_extent": 32,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
            "mlp_layer_types": _DENSE_FIRST,
            "intermediate_size": 40,
            "moe_intermediate_size": 20,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "logits_mup_width_multiplier": 2.0,
        },
    ),
    Family(
        name="inkling2",
        model_class="Inkling2ForCausalLM",
        config_class="Inkling2TextConfig",
        config={
            **_BASE,
            "unpadded_vocab_size": 120,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": 8,
            "d_rel": 6,
            "rel_extent": 32,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
            "moe_intermediate_size": 20,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_layers_per_attn_res_block": 2,
        },
    ),
    _family(
        "jamba",
        "Jamba",
        _BASE,
        num_hidden_layers=4,
        intermediate_size=20,
        num_experts=8,
        num_experts_per_tok=2,
        attn_layer_period=4,
        attn_layer_offset=3,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
    ),
    _family(
        "kimi_linear",
        "KimiLinear",
        _MLA | _ROUTED,
        num_hidden_layers=4,
        q_lora_rank=None,
        num_local_experts=8,
        layer_types=_LINEAR_FULL,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        linear_head_dim=12,
        linear_num_heads=4,
    ),
    _family(
        "kolibri1",
        "Kolibri1",
        _BASE | _MOE,
        head_dim=16,
        shared_expert_intermediate_size=28,
        sliding_window=8,
        layer_types=_FULL_SLIDING,
    ),
    _family(
        "laguna",
        "Laguna",
        _BASE | _MOE,
        head_dim=16,
        intermediate_size=40,
        shared_expert_intermediate_size=28,
        sliding_window=8,
        layer_types=_FULL_SLIDING,
        mlp_layer_types=_DENSE_FIRST,
        num_attention_heads_per_layer=[4, 6, 4],
        moe_routed_scaling_factor=1.5,
        moe_router_logit_softcapping=10.0,
    ),
    _family(
        "lfm2_moe",
        "Lfm2Moe",
        _BASE | _MOE,
        intermediate_size=40,
        num_dense_layers=1,
        layer_types=["conv", "full_attention", "conv"],
        tie_word_embeddings=True,
    ),
    _family(
        "mellum",
        "Mellum",
        _BASE | _MOE,
        head_dim=16,
        intermediate_size=40,
        sliding_window=8,
        layer_types=_FULL_SLIDING,
        mlp_layer_types=["sparse", "dense", "sparse"],
    ),
    _family(
        "mimo_v2_flash",
        "MiMoV2Flash",
        _BASE | _ROUTED,
        head_dim=18,
        v_head_dim=10,
        sliding_window=8,
        layer_types=_FULL_SLIDING,
        mlp_layer_types=_DENSE_FIRST,
    ),
    _family(
        "minimax",
        "MiniMax",
        _BASE,
        num_hidden_layers=4,
        layer_types=_LINEAR_FULL,
        head_dim=16,
        intermediate_size=20,
        num_local_experts=8,
        num_experts_per_tok=2,
        block_size=8,
        full_attn_alpha_factor=1.2,
        mlp_alpha_factor=1.3,
    ),
    _family(
        "minimax_m2",
        "MiniMaxM2",
        _BASE,
        head_dim=16,
        intermediate_size=20,
        num_local_experts=8,
        num_experts_per_tok=2,
        rotary_dim=8,
    ),
    Family(
        name="minimax_m3_vl",
        model_class="MiniMaxM3VLForCausalLM",
        config_class="MiniMaxM3VLTextConfig",
        config={
            **_BASE,
            "head_dim": 16,
            "rotary_dim": 8,
            "intermediate_size": 20,
            "dense_intermediate_size": 40,
            "shared_intermediate_size": 28,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            "mlp_layer_types": _DENSE_FIRST,
            "swiglu_limit": 1.0,
        },
        notes="text tower of the vision-language model",
    ),
    _family(
        "mistral4",
        "Mistral4",
        _MLA | _ROUTED,
        first_k_dense_replace=1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    _family("mixtral", "Mixtral", _BASE, intermediate_size=20, num_local_experts=8, num_experts_per_tok=2),
    Family(
        name="nemotron_h",
        model_class="NemotronHForCausalLM",
        config_class="NemotronHConfig",
        config={
            **{key: value for key, value in _BASE.items() if key != "num_hidden_layers"},
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
            "head_dim": 16,
            "intermediate_size": 40,
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 12,
            "n_groups": 2,
            "chunk_size": 8,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "moe_intermediate_size": 20,
            "moe_shared_expert_intermediate_size": 28,
            "moe_latent_size": 32,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
        },
        notes="experts have no gate, and work on a latent narrower than the model",
    ),
    _family("olmoe", "Olmoe", _BASE, intermediate_size=20, num_experts=8, num_experts_per_tok=2, clip_qkv=4.0),
    _family(
        "phimoe",
        "Phimoe",
        _BASE,
        intermediate_size=20,
        num_local_experts=8,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
    ),
    _family(
        "qwen2_moe",
        "Qwen2Moe",
        _BASE | _MOE,
        intermediate_size=40,
        shared_expert_intermediate_size=28,
        mlp_only_layers=[1],
    ),
    Family(
        name="qwen3_5_moe",
        model_class="Qwen3_5MoeForCausalLM",
        config_class="Qwen3_5MoeTextConfig",
        config={
            **_BASE,
            **_MOE,
            **_GATED_DELTA,
            "num_hidden_layers": 4,
            "layer_types": _LINEAR_FULL,
            "shared_expert_intermediate_size": 28,
        },
    ),
    _family(
        "qwen3_moe",
        "Qwen3Moe",
        _BASE | _MOE,
        head_dim=16,
        intermediate_size=40,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    _family(
        "qwen3_next",
        "Qwen3Next",
        _BASE | _MOE | _GATED_DELTA,
        num_hidden_layers=4,
        layer_types=_LINEAR_FULL,
        intermediate_size=40,
        shared_expert_intermediate_size=28,
        mlp_only_layers=[2],
    ),
    Family(
        name="qwen4_exp",
        model_class="Qwen4ExpForCausalLM",
        config_class="Qwen4ExpTextConfig",
        config={
            **_BASE,
            **_MOE,
            **_GATED_DELTA,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention", "indexed_attention"],
            "shared_expert_intermediate_size": 28,
            "hc_count": 2,
            "hc_lowrank": 6,
            "ple_layer_ids": [1],
            "ple_embed_dim": 16,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 4,
            "split_ngram_parts": 2,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
            "eos_token_id": 127,
        },
        notes="the n-gram embedding needs an eos id in the config; generation still never stops",
    ),
    _family("solar_open", "SolarOpen", _BASE | _ROUTED, head_dim=16),
    Family(
        name="zaya",
        model_class="ZayaForCausalLM",
        config_class="ZayaConfig",
        config={
            **_BASE,
            **_MOE,
            "head_dim": 16,
            "num_experts_per_tok": 1,
            "router_hidden_size": 18,
            "sliding_window": 8,
            "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
            "tie_word_embeddings": True,
        },
        gains={"embed_tokens": 8.0, "o_proj": 0.3, "experts": 2.0, "out_proj": 6.0},
        notes="one expert a token; the router's extra class means none: it arrives as expert 0 with weight 0",
    ),
)


def _mrope(*sections: int) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


# Vision towers, one layer each: they must be there for the class to be built, and no test feeds them a picture.
_VISION: dict[str, object] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN_VISION: dict[str, object] = {
    **_VISION,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_QWEN_VL_TEXT: dict[str, object] = {
    **_BASE,
    **_MOE,
    "head_dim": 16,
    "intermediate_size": 40,
    "mlp_only_layers": [1],
    "rope_parameters": _mrope(4, 2, 2),
}
_PIXTRAL: dict[str, object] = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_OCR_SAM: dict[str, object] = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "window_size": 2,
    "global_attn_indexes": [0],
    "mlp_dim": 24,
    "downsample_channels": [12, 16],
}


def _composite(
    name: str, prefix: str, text: dict[str, object], *, model_class: str = "", notes: str = "", **towers: object
) -> Family:
    return Family(
        name=name,
        model_class=model_class or f"{prefix}ForConditionalGeneration",
        config_class=f"{prefix}Config",
        config={"text_config": text, "tie_word_embeddings": text["tie_word_embeddings"], **towers},
        notes=notes,
    )


# Families whose only language-model head sits in a vision or audio class, used with text alone.
_MULTIMODAL = (
    _composite(
        "deepseek_ocr2",
        "DeepseekOcr2",
        {**_BASE, **_ROUTED, "n_group": 1, "topk_group": 1, "mlp_layer_types": _DENSE_FIRST},
        vision_config={
            "sam_config": _OCR_SAM,
            "encoder_config": {
                "vocab_size": 8,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
        },
    ),
    _composite(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoe",
        {
            **_BASE,
            "intermediate_size": 40,
            "moe_intermediate_size": [20, 12],
            "moe_k": 2,
            "moe_num_experts": 8,
            "moe_num_shared_experts": 2,
            "mlp_layer_types": _DENSE_FIRST,
            "rope_parameters": _mrope(2, 2, 2),
            "tie_word_embeddings": True,
        },
        vision_config={**_VISION, "temporal_merge_size": 2},
        notes="two experts modules a layer, of different widths: text tokens never reach the vision experts",
    ),
    _composite(
        "glm4v_moe",
        "Glm4vMoe",
        {**_BASE, **_ROUTED, "head_dim": 16, "first_k_dense_replace": 1, "rope_parameters": _mrope(2, 1, 1)},
        vision_config={**_VISION, "out_hidden_size": 48, "image_size": 16},
    ),
    _composite(
        "glm5_next",
        "Glm5Next",
        {
            **_DSA,
            **_ROUTED,
            "num_hidden_layers": 4,
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "indexed_attention", "indexed_attention", "linear_attention"],
            "indexer_types": ["full", "full", "shared", "full"],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "index_kpool": 4,
            "linear_head_dim": 12,
            "linear_num_heads": 4,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 4,
            "swiglu_limit": 1.0,
        },
        vision_config={**_VISION, "out_hidden_size": 48, "image_size": 16, "projection_intermediate_size": 24},
    ),
    _composite(
        "mistral_large4",
        "MistralLarge4",
        {
            **_DSA,
            **_ROUTED,
            "first_k_dense_replace": 1,
            "indexer_types": ["full", "full", "shared"],
            "no_rope_layers": [1, 0, 1],
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.0,
            },
        },
        vision_config=_PIXTRAL,
    ),
    _composite(
        "muse_spark",
        "MuseSpark",
        {
            **_BASE,
            "head_dim": 16,
            "intermediate_size": 40,
            "moe_intermediate_size": 20,
            "moe_hidden_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": _FULL_SLIDING,
            "mlp_layer_types": _DENSE_FIRST,
            "output_multiplier": 1.0,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
        },
        audio_config={"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "out_hidden_size": 48},
        out_hidden_size=64,
        projector_hidden_size=24,
        notes="every expert's output passes a norm; experts work on a latent narrower than the model",
    ),
    _composite(
        "qwen3_omni_moe",
        "Qwen3OmniMoeThinker",
        _QWEN_VL_TEXT,
        vision_config=_QWEN_VISION,
        audio_config={
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "d_model": 16,
            "output_dim": 48,
            "downsample_hidden_size": 4,
        },
        vision_start_token_id=151652,
        notes="the thinker; the talker speaks, and cannot be prompted with text ids",
    ),
    replace(
        _composite("qwen3_vl_moe", "Qwen3VLMoe", _QWEN_VL_TEXT, vision_config=_QWEN_VISION), published_transposed=True
    ),
    _composite(
        "unlimited_ocr",
        "UnlimitedOcr",
        {
            **_BASE,
            **_ROUTED,
            "num_key_value_heads": 4,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": _DENSE_FIRST,
            "sliding_window": 8,
        },
        vision_config={
            "sam_config": _OCR_SAM,
            "encoder_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
        },
        notes="with a cache, generated tokens see the prompt and a window: `generate` differs from one whole forward",
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in (*_ALL, *_MULTIMODAL)}


def _text(name: str) -> dict[str, object]:
    return FAMILIES[name].config


# Folders with a text class of their own whose checkpoints are published from the class that also sees or hears: other
# key prefixes, and for some other expert layouts. `build` and `save_layout` take their keys too.
_ALSO_MULTIMODAL = (
    _composite(
        "aria",
        "Aria",
        _text("aria"),
        vision_config={
            "model_type": "idefics3_vision",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        projector_patch_to_query_dict={"16": 4},
    ),
    _composite(
        "dots3_note",
        "Dots3Note",
        _text("dots3_note"),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
            "mlp_layer_types": ["sparse"],
            "num_local_experts": 4,
            "moe_intermediate_size": 12,
            "adapter_in_dim": 16,
            "adapter_out_dim": 48,
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "feature_size": 8,
            "downsample_hidden_size": 4,
            "adapter_input_size": 16,
            "adapter_out_dim": 48,
        },
        notes="the vision tower has experts of its own, in other words and of another width; text never reaches them",
    ),
    _composite("gemma4", "Gemma4", _text("gemma4"), notes="both towers are optional, and absent here"),
    _composite(
        "inkling",
        "Inkling",
        _text("inkling"),
        vision_config={"patch_size": 2, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
        notes="published experts interleave the rows of gate and up",
    ),
    _composite(
        "inkling2",
        "Inkling2",
        _text("inkling2"),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
            "posemb_grid_size": 4,
            "projection_hidden_dim": 24,
            "text_hidden_size": 48,
        },
        notes="published experts interleave the rows of gate and up",
    ),
    _composite(
        "minimax_m3_vl",
        "MiniMaxM3VL",
        _text("minimax_m3_vl"),
        model_class="MiniMaxM3SparseForConditionalGeneration",
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        projector_hidden_size=24,
        notes="published one expert a tensor, unlike the text class's stacked ones",
    ),
    _composite(
        "qwen3_5_moe",
        "Qwen3_5Moe",
        {**_text("qwen3_5_moe"), "rope_parameters": {**_mrope(1, 1, 0), "partial_rotary_factor": 0.25}},
        vision_config={**_VISION, "out_hidden_size": 48, "num_position_embeddings": 16},
    ),
    _composite(
        "qwen4_exp",
        "Qwen4Exp",
        {**_text("qwen4_exp"), "rope_parameters": {**_mrope(4, 2, 2), "partial_rotary_factor": 1.0}},
        vision_config={**_VISION, "out_hidden_size": 48, "num_position_embeddings": 16},
    ),
)

_INTERNVL_VISION: dict[str, object] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": [16, 16],
    "patch_size": [4, 4],
}
_TRANSCRIBE_AUDIO: dict[str, object] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_mel_bins": 8,
}


def _around(text: str, name: str, prefix: str, *, model_type: str = "", **towers: object) -> Family:
    """The text model of the family `text` in a class that takes any."""
    return _composite(name, prefix, {"model_type": model_type or text, **_text(text)}, **towers)  # type: ignore[arg-type]


# Folders without experts of their own: their text part is whatever the config names, and is published with experts.
_AROUND: dict[str, Family] = {
    "cosmos3_omni": _composite(
        "cosmos3_omni",
        "Cosmos3Omni",
        {"model_type": "qwen3_vl_moe_text", **_QWEN_VL_TEXT},
        vision_config={"model_type": "qwen3_vl_vision", **_QWEN_VISION},
    ),
    "internvl_gpt_oss": _around("gpt_oss", "internvl", "InternVL", vision_config=_INTERNVL_VISION),
    "internvl_qwen3_moe": _around("qwen3_moe", "internvl", "InternVL", vision_config=_INTERNVL_VISION),
    "kimi_k25": _around(
        "deepseek_v3",
        "kimi_k25",
        "Kimi_K25",
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "pos_emb_time": 2,
        },
        projection_hidden_size=64,
    ),
    "mistral3_mistral4": _around("mistral4", "mistral3", "Mistral3", vision_config=_PIXTRAL),
    "nemotron3_5_transcribe": _around(
        "nemotron_h",
        "nemotron3_5_transcribe",
        "Nemotron3_5Transcribe",
        audio_config={
            "asr_config": _TRANSCRIBE_AUDIO,
            "diarization_config": {
                "audio_config": _TRANSCRIBE_AUDIO,
                "head_config": {"hidden_size": 16, "audio_hidden_size": 16},
            },
        },
        word_timestamp_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 8,
            "blank_token_id": 7,
        },
        audio_token_id=128,
    ),
    "nemotron_h_omni": replace(
        _around(
            "nemotron_h",
            "nemotron_h_omni",
            "",
            model_class="NemotronH_Omni_Reasoning_V3",
            vision_config={
                "model_type": "radio",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
                "video_temporal_patch_size": 2,
            },
            projector_hidden_size=24,
            vision_hidden_size=16,
        ),
        config_class="NemotronH_Omni_Reasoning_V3_Config",
    ),
}

MULTIMODAL: dict[str, Family] = {f"{family.name}_multimodal": family for family in _ALSO_MULTIMODAL} | _AROUND

# Folder -> why no tiny causal text model of it is here.
EXCLUDED: dict[str, str] = {
    "doge": "an expert is one row of an embedding table, too small to stream; run its models (20M to 320M) whole",
    "diffusion_gemma": "denoises whole blocks of tokens; it has no causal language-model head and no next-token logits",
    "openai_privacy_filter": "labels tokens in both directions; it has no language-model head and does not generate",
    "vitpose_backbone": "finds the joints of people in pictures; it has no text model",
}


def find_family(name: str) -> Family:
    """The family of a folder, or of a folder's multimodal class by its key in `MULTIMODAL`."""
    return FAMILIES[name] if name in FAMILIES else MULTIMODAL[name]


def make_config(name: str) -> PretrainedConfig:
    """A fresh config of the family; the caller may change it."""
    family = find_family(name)
    config_type = _find_class(family, family.config_class, "configuration")
    config = config_type(**copy.deepcopy(family.config))
    assert isinstance(config, PretrainedConfig), f"{config_type=}"
    return config


def model_class(name: str) -> type[PreTrainedModel]:
    """The class of the family's model with a language-model head."""
    family = find_family(name)
    model_type = _find_class(family, family.model_class, "modeling")
    assert issubclass(model_type, PreTrainedModel), f"{model_type=}"
    return model_type


def build(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, overrides: dict[str, object] | None = None
) -> PreTrainedModel:
    """The family's tiny model in eval mode, eager attention and experts; same seed, same weights.

    `overrides` change attributes of the config. Weights are drawn in float32 and then rounded to `dtype`, so models of
    two dtypes differ by rounding only.
    """
    config = make_config(name)
    for key, value in (overrides or {}).items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(name)._from_config(
            config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
    _spread_weights(model, find_family(name), seed)
    if dtype != torch.float32:
        model = _reload_as(model, dtype)
    model.eval()
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def save_layout(model: PreTrainedModel, folder: Path, layout: Layout) -> None:
    """Write the model to `folder` as a checkpoint.

    published: as the family's checkpoints are found on the hub (transformers undoes its own conversions).
    stacked: parameters as they lie in memory, one 3-D tensor for all experts of a layer.
    shards: published, cut into many files with an index.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if layout == "stacked":
        model.save_pretrained(folder, save_original_format=False)
        return
    model.save_pretrained(folder, max_shard_size=_SHARD_SIZE if layout == "shards" else "1GB")
    if any(family.published_transposed for family in FAMILIES.values() if family.model_class == type(model).__name__):
        _transpose_experts(folder)


def _transpose_experts(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        turned = {key: t.transpose(1, 2).contiguous() if ".experts." in key else t for key, t in tensors.items()}
        save_file(turned, file, metadata={"format": "pt"})


def expert_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Every (name, module) that transformers' experts decorator has taken over, in order."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "is_concatenated"))


def import_family(name: str) -> Any:
    """A module below transformers.models; skips the test where this transformers is older than the family."""
    try:
        return importlib.import_module(f"transformers.models.{name}")
    except ModuleNotFoundError:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")


def _find_class(family: Family, class_name: str, kind: str) -> type:
    found = getattr(import_family(f"{family.name}.{kind}_{family.name}"), class_name)
    assert isinstance(found, type), f"{class_name=} {found=}"
    return found


def _spread_weights(model: PreTrainedModel, family: Family, seed: int) -> None:
    """Redraw weights so that every part matters to the logits.

    Matrices get a standard deviation of one over the root of their smaller side, which keeps activations near one
    through experts that are narrower than the model. Vectors and biases (norms, sinks, decays, the router's selection
    bias) keep the value that the family starts them at and get noise: a norm stays near one, or near zero where the
    family adds the one itself. Integer tables that route by token id get distinct experts for each token.
    """
    is_tied = bool(model.config.tie_word_embeddings)
    gains = _ATTENTION_GAIN | family.gains
    with torch.no_grad():
        for name, tensor in _drawn_tensors(model):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            if not tensor.is_floating_point():
                tensor.copy_(_distinct_ids(tensor, _num_experts(model), generator))
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("balancing_biases"):
                tensor[:-1] = _ZAYA_BIAS + _VECTOR_NOISE * noise[:-1]
            elif tensor.dim() < 2 or name.endswith("bias"):
                tensor.add_(_VECTOR_NOISE * noise)
            else:
                tensor.copy_(noise * _matrix_std(name, tensor, is_tied) * gains.get(_leaf_module(name), 1.0))


_VECTOR_NOISE = 0.1

# zaya's last router class means no expert. transformers 5.23 loads its bias as -1 whatever the checkpoint says
# (`_init_weights` writes it into the loaded buffer), so the others are lowered to let it win now and then.
_ZAYA_BIAS = -0.9

# Chosen so that greedy text wanders. Attention averages over the tokens, so its output is halved, or the last token is
# hardly heard and the model falls into one that it repeats; tied embeddings are small, or it repeats its last token.
_ATTENTION_GAIN = {"o_proj": 0.5}
_EMBEDDING_STD = 0.3
_TIED_EMBEDDING_STD = 0.05

# State that a checkpoint carries in buffers and that is flat, or zero, before training.
_DRAWN_BUFFERS = frozenset({"e_score_correction_bias", "expert_bias", "balancing_biases", "layer_scalar", "tid2eid"})


def _drawn_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name.rpartition(".")[2] in _DRAWN_BUFFERS)


def _leaf_module(name: str) -> str:
    return name.split(".")[-2] if "." in name else ""


def _matrix_std(name: str, tensor: torch.Tensor, is_tied: bool) -> float:
    if _leaf_module(name) == "embed_tokens":
        return _TIED_EMBEDDING_STD if is_tied else _EMBEDDING_STD
    is_convolution = tensor.dim() == 3 and "conv" in name
    fan_in = tensor[0].numel() if is_convolution else min(tensor.shape[-2:])
    return 1.0 / math.sqrt(fan_in)


def _distinct_ids(table: torch.Tensor, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(table.shape[0], num_experts, generator=generator).topk(table.shape[1]).indices


def _num_experts(model: PreTrainedModel) -> int:
    _, experts = next(expert_modules(model))
    assert isinstance(experts.num_experts, int), f"{experts.num_experts=}"
    return experts.num_experts


def _reload_as(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model rounded to `dtype` as transformers rounds it on load: some families keep their routers in float32."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        model.save_pretrained(folder, save_original_format=False)
        return type(model).from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
