"""A tiny real model of every family that transformers routes through its experts door.

Each `Family` is a config of the family's own class, small enough to run in milliseconds, and wide enough to be wrong in a
visible way: expert width differs from model width, weights are spread so that a wrong expert, a wrong layer or a swapped
half moves the logits, biases and attention sinks are not zero. `build` makes the model, `save_layout` writes it in the
forms a checkpoint is found in. Nothing here knows offmoe: these are the models it is measured against.
"""

from __future__ import annotations

import copy
import importlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
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


def _family(name: str, prefix: str, base: dict[str, object], *, notes: str = "", **overrides: object) -> Family:
    config = {**base, **overrides}
    return Family(
        name=name, model_class=f"{prefix}ForCausalLM", config_class=f"{prefix}Config", config=config, notes=notes
    )


_ALL = (
    _family("mixtral", "Mixtral", _BASE, intermediate_size=20, num_local_experts=8, num_experts_per_tok=2),
    _family(
        "qwen2_moe",
        "Qwen2Moe",
        _BASE,
        intermediate_size=40,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=28,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    _family(
        "qwen3_moe",
        "Qwen3Moe",
        _BASE,
        head_dim=16,
        intermediate_size=40,
        moe_intermediate_size=20,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    _family(
        "qwen3_next",
        "Qwen3Next",
        _BASE,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        intermediate_size=40,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=28,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[2],
    ),
    _family(
        "deepseek_v2",
        "DeepseekV2",
        _MLA,
        intermediate_size=40,
        moe_intermediate_size=20,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=2,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
    ),
    _family(
        "deepseek_v3",
        "DeepseekV3",
        _MLA,
        intermediate_size=40,
        moe_intermediate_size=20,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
    ),
    _family("olmoe", "Olmoe", _BASE, intermediate_size=20, num_experts=8, num_experts_per_tok=2, clip_qkv=4.0),
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
    _family(
        "glm4_moe",
        "Glm4Moe",
        _BASE,
        head_dim=16,
        intermediate_size=40,
        moe_intermediate_size=20,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        use_qk_norm=True,
        attention_bias=True,
        routed_scaling_factor=1.5,
    ),
    _family(
        "granitemoe",
        "GraniteMoe",
        _BASE,
        intermediate_size=20,
        num_local_experts=8,
        num_experts_per_tok=2,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
        tie_word_embeddings=True,
    ),
    _family(
        "minimax",
        "MiniMax",
        _BASE,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        head_dim=16,
        intermediate_size=20,
        num_local_experts=8,
        num_experts_per_tok=2,
        block_size=8,
        full_attn_alpha_factor=1.2,
        mlp_alpha_factor=1.3,
    ),
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
        "hunyuan_v1_moe",
        "HunYuanMoEV1",
        _BASE,
        head_dim=16,
        intermediate_size=20,
        num_experts=8,
        moe_topk=2,
    ),
    _family(
        "dots1",
        "Dots1",
        _BASE,
        head_dim=16,
        intermediate_size=40,
        moe_intermediate_size=20,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}

# Folder -> why no tiny causal text model of it is here.
EXCLUDED: dict[str, str] = {}


def make_config(name: str) -> PretrainedConfig:
    """A fresh config of the family; the caller may change it."""
    family = FAMILIES[name]
    config_type = _find_class(family, family.config_class, "configuration")
    config = config_type(**copy.deepcopy(family.config))
    assert isinstance(config, PretrainedConfig), f"{config_type=}"
    return config


def model_class(name: str) -> type[PreTrainedModel]:
    """The family's causal model class."""
    family = FAMILIES[name]
    model_type = _find_class(family, family.model_class, "modeling")
    assert issubclass(model_type, PreTrainedModel), f"{model_type=}"
    return model_type


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The family's tiny model in eval mode, eager attention and experts; same seed, same weights.

    Weights are drawn in float32 and then rounded to `dtype`, so models of two dtypes differ by rounding only.
    """
    config = make_config(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(name)._from_config(
            config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
    _spread_weights(model, seed)
    model = _to_dtype(model, dtype).eval()
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
    if layout == "published":
        model.save_pretrained(folder)
    elif layout == "stacked":
        model.save_pretrained(folder, save_original_format=False)
    elif layout == "shards":
        model.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    else:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")


def expert_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Every (name, module) that transformers' experts decorator has taken over, in order."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "is_concatenated"))


def _find_class(family: Family, class_name: str, kind: str) -> type:
    module = importlib.import_module(f"transformers.models.{family.name}.{kind}_{family.name}")
    found = getattr(module, class_name)
    assert isinstance(found, type), f"{class_name=} {found=}"
    return found


def _spread_weights(model: PreTrainedModel, seed: int) -> None:
    """Redraw weights so that every part matters to the logits.

    Matrices get a standard deviation of one over the root of their smaller side, which keeps activations near one through
    experts that are narrower than the model. Vectors and biases (norms, sinks, decays, the router's selection bias) keep
    the value that the family starts them at and get noise: a norm stays near one, or near zero where the family adds the
    one itself.
    """
    with torch.no_grad():
        for name, tensor in _drawn_tensors(model):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() < 2 or name.endswith("bias"):
                tensor.add_(_VECTOR_NOISE * noise)
            else:
                tensor.copy_(noise * _matrix_std(tensor))


def _drawn_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        # A router's selection bias is a buffer in most families, and zero until it is trained.
        if name.rpartition(".")[2] in _ROUTER_BUFFERS:
            yield name, buffer


_VECTOR_NOISE = 0.1
_ROUTER_BUFFERS = frozenset({"e_score_correction_bias", "expert_bias"})


def _matrix_std(tensor: torch.Tensor) -> float:
    is_depthwise_conv = tensor.dim() == 3 and tensor.shape[1] == 1
    fan_in = tensor.shape[2] if is_depthwise_conv else min(tensor.shape[-2:])
    return float(fan_in) ** -0.5


def _to_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    if dtype == torch.float32:
        return model
    model.to(dtype)
    model.config.dtype = dtype
    return model
