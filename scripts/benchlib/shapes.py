"""Shapes of further MoE models, with their tensors as transformers names them in memory (experts stacked).

`families` writes what publishers publish; here transformers' own classes say which tensors there are, so that a shape
is a config. Where a layer of the published model is larger than a bench's RAM it has fewer experts: a token reads as
many as it would.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchlib.families import COMMON, EMBEDDING_DEVIATION, OUTPUT_NAME, Config, TensorSpec

SHAPES: dict[str, Config] = {
    # Heads, delta net and experts as Qwen3.5-35B-A3B has them, 64 experts of 256.
    "qwen3.5-moe": {
        "model_type": "qwen3_5_moe_text", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "max_position_embeddings": 4096,
    },
    # GLM-4.5-Air, 64 experts of 128.
    "glm-4.5-air": {
        "model_type": "glm4_moe", "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 64,
        "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_qk_norm": False, "attention_bias": True,
        "max_position_embeddings": 131072,
    },
    # DeepSeek-V3, 32 experts of 256 and one dense layer of three.
    "deepseek-v3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 32, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "max_position_embeddings": 4096,
    },
    # Gemma 4 26B-A4B, 64 experts of 128.
    "gemma-4-26b-a4b": {
        "model_type": "gemma4_text", "hidden_size": 2816, "intermediate_size": 2112, "moe_intermediate_size": 704,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2, "head_dim": 256,
        "global_head_dim": 512, "attention_k_eq_v": True, "num_experts": 64, "top_k_experts": 8,
        "enable_moe_block": True, "hidden_size_per_layer_input": 0, "sliding_window": 1024,
        "final_logit_softcapping": 30.0, "tie_word_embeddings": True, "max_position_embeddings": 262144,
    },
}  # fmt: skip


def shape_config(like: str, *, num_layers: int, vocab_size: int, dtype: str) -> Config:
    """The configuration of `like`, one of SHAPES, as transformers completes it."""
    from transformers import AutoConfig

    given: dict[str, Any] = COMMON | SHAPES[like]
    given |= {"num_hidden_layers": num_layers, "vocab_size": vocab_size, "dtype": dtype}
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    config.architectures = [type(_on_meta(config)).__name__]
    written: Config = config.to_dict()
    return written


def shape_specs(config: Config) -> Iterator[TensorSpec]:
    """Every tensor of `shape_config`'s model, drawn as `families.tensor_specs` draws them."""
    from transformers import AutoConfig

    model = _on_meta(AutoConfig.for_model(**config))
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    deviation = config["initializer_range"]
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        spec = TensorSpec(name=name, shape=tuple(tensor.shape), deviation=deviation)
        if len(spec.shape) == 1 and re.search(r"(norm|scale|scalar)", name):
            yield replace(spec, ones=True)
        elif "embed_tokens" in name:
            yield replace(spec, deviation=EMBEDDING_DEVIATION)
        elif OUTPUT_NAME.search(name):
            yield replace(spec, deviation=deviation / (2 * config["num_hidden_layers"]) ** 0.5)
        else:
            yield spec


def _on_meta(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
