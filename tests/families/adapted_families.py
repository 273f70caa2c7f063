"""Tiny real models of the families that offmoe serves through an adapter; `families.py` has those behind the door."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import transformers
from families import Family, _spread_weights, import_family
from transformers import PreTrainedModel

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
_LLAMA4_TEXT: dict[str, object] = {
    **_BASE,
    "head_dim": 16,
    "intermediate_size": 20,
    "intermediate_size_mlp": 40,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 16,
}


def _family(name: str, model_class: str, config_class: str, notes: str = "", **config: object) -> Family:
    return Family(name=name, model_class=model_class, config_class=config_class, config=config, notes=notes)


_DECODERS: dict[str, Family] = {
    "dbrx": _family(
        "dbrx",
        "DbrxForCausalLM",
        "DbrxConfig",
        vocab_size=128,
        d_model=48,
        n_heads=4,
        n_layers=3,
        max_seq_len=256,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 48, "ffn_hidden_size": 20, "moe_num_experts": 8, "moe_top_k": 3},
        pad_token_id=0,
        bos_token_id=1,
    ),
    "jetmoe": _family(
        "jetmoe",
        "JetMoeForCausalLM",
        "JetMoeConfig",
        "the experts of its attention stay resident",
        **{key: value for key, value in _BASE.items() if key != "num_attention_heads"},
        kv_channels=16,
        intermediate_size=20,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "llama4": _family("llama4", "Llama4ForCausalLM", "Llama4TextConfig", "", **_LLAMA4_TEXT),
    "llama4_top2": _family(
        "llama4", "Llama4ForCausalLM", "Llama4TextConfig", "", **{**_LLAMA4_TEXT, "num_experts_per_tok": 2}
    ),
    "llama4_multimodal": _family(
        "llama4",
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        text_config=_LLAMA4_TEXT,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "vision_output_dim": 24,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
        },
        boi_token_index=120,
        eoi_token_index=121,
        image_token_index=122,
    ),
    "longcat_flash": _family(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        "experts that compute nothing are added by offmoe",
        **{key: value for key, value in _BASE.items() if key not in ("num_hidden_layers", "num_key_value_heads")},
        num_layers=2,
        num_key_value_heads=4,
        ffn_hidden_size=40,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        head_dim=8,
        v_head_dim=10,
        moe_topk=3,
        n_routed_experts=8,
        zero_expert_num=4,
        expert_ffn_hidden_size=20,
        routed_scaling_factor=1.5,
    ),
    "step3p7": _family(
        "step3p7",
        "Step3p7ForConditionalGeneration",
        "Step3p7Config",
        "text only",
        text_config={
            **_BASE,
            "head_dim": 16,
            "intermediate_size": 40,
            "moe_intermediate_size": 20,
            "share_expert_dim": 20,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "n_routed_experts": 8,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
            "num_sliding_attention_heads": 4,
            "swiglu_limits": [0.0, 0.0, 0.5],
            "swiglu_limits_shared": [0.0, 0.0, 0.5],
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        image_token_id=122,
        tie_word_embeddings=False,
    ),
}

_ENCODER_DECODERS: dict[str, Family] = {
    "switch_transformers": _family(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        "encoder-decoder, tokens over capacity included",
        vocab_size=128,
        d_model=48,
        d_kv=12,
        d_ff=20,
        expert_capacity=2,
        num_layers=4,
        num_sparse_encoder_layers=2,
        num_decoder_layers=4,
        num_sparse_decoder_layers=2,
        num_heads=4,
        num_experts=8,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
        eos_token_id=1,
    ),
    "nllb_moe": _family(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        "encoder-decoder, as published: transformers 5.23 itself runs only its experts 0 and 1",
        vocab_size=128,
        d_model=48,
        encoder_layers=2,
        encoder_ffn_dim=20,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_ffn_dim=20,
        decoder_attention_heads=4,
        num_experts=8,
        expert_capacity=2,
        encoder_sparse_step=1,
        decoder_sparse_step=2,
        moe_eval_capacity_token_fraction=0.25,
        tie_word_embeddings=False,
        max_position_embeddings=256,
    ),
}


def _of_width(config: dict[str, Any], width: int) -> dict[str, Any]:
    return {
        key: width if key in _WIDTHS
        else _of_width(value, width) if isinstance(value, dict) and key != "vision_config"
        else value
        for key, value in config.items()
    }  # fmt: skip


def nllb_as_published(
    experts: Any, hidden_states: torch.Tensor, router_mask: torch.Tensor, router_probs: torch.Tensor
) -> torch.Tensor:
    """Every expert for the tokens that have a share in it (fairseq, transformers 4): 5.23 runs experts 0 and 1 only."""
    total = torch.zeros_like(hidden_states)
    for idx in range(experts.num_experts):
        rows = router_probs[:, idx] > 0
        answer = experts[f"expert_{idx}"](hidden_states[rows]) * router_probs[rows, idx, None]
        total[rows] += answer * (1 - experts.moe_token_dropout)
    return total


ADAPTED: dict[str, Family] = {**_DECODERS, **_ENCODER_DECODERS}
if tuple(map(int, transformers.__version__.split(".")[:2])) == (5, 24):
    del ADAPTED["llama4_multimodal"]  # its forward fails by itself: it asks the text model's output for image_outputs
ENCODER_DECODERS = tuple(_ENCODER_DECODERS)


_WIDTHS = frozenset({
    "d_ff", "d_model", "decoder_ffn_dim", "encoder_ffn_dim", "expert_ffn_hidden_size", "ffn_hidden_size", "hidden_size",
    "intermediate_size", "moe_intermediate_size", "share_expert_dim",
})  # fmt: skip


def build_adapted(name: str, *, seed: int = 0, width: int | None = None) -> PreTrainedModel:
    """The family's tiny model in eval mode with eager attention, float32; same seed, same weights. `width`: that of the
    text model and of its experts, instead of their own.
    """
    family = ADAPTED[name]
    if width is not None:
        family = replace(family, config=_of_width(family.config, width))
    configs = import_family(f"{family.name}.configuration_{family.name}")
    models = import_family(f"{family.name}.modeling_{family.name}")
    config: Any = getattr(configs, family.config_class)(**copy.deepcopy(family.config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(models, family.model_class)._from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
    _spread_weights(model, family, seed)
    model.eval()
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model
