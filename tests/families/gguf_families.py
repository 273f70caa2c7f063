"""Tiny models of many families as GGUF files, in float32, as llama.cpp's converter writes them.

The metadata are those that the converter wrote for these very models (gguf_metadata.json; llama.cpp as of
llama-cpp-python 0.3.36, its vocabulary step left out). The tensors are made here, as its `modify_tensors` does; they
were compared with the converter's files bit for bit when this was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapted_families
import families
import gguf
import torch
from gguf_makers import _published
from transformers import PreTrainedModel

METADATA: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "gguf_metadata.json").read_text(encoding="utf-8")
)
# Files of models that transformers has no class for. Another family's model computes the same, and its metadata are
# these but for some: `scale`s are 1, and the names are their own.
METADATA["bailingmoe"] = {
    key: value for key, value in METADATA["granitemoeshared"].items() if "scale" not in key
} | {
    "general.architecture": "bailingmoe", "leading_dense_block_count": 0, "expert_shared_count": 2,
    "expert_weights_scale": 1.0, "expert_weights_norm": True, "expert_feed_forward_length": 20,
}  # fmt: skip
METADATA["bailingmoe2"] = METADATA["glm4_moe"] | {
    "general.architecture": "bailingmoe2", "expert_group_count": 2, "expert_group_used_count": 1,
    "attention.key_length": 12, "attention.value_length": 12, "rope.dimension_count": 6,
}  # fmt: skip
METADATA["qwen3vlmoe"] = METADATA["glm4_moe"] | {
    "general.architecture": "qwen3vlmoe", "rope.dimension_sections": [3, 3, 2, 0], "n_deepstack_layers": 2,
    "attention.layer_norm_rms_epsilon": 1e-6, "rope.dimension_count": 16,
}  # fmt: skip
for _key in ("expert_gating_func", "expert_weights_scale", "expert_shared_count", "leading_dense_block_count"):
    del METADATA["qwen3vlmoe"][_key]
_FAMILIES = {"bailingmoe": "granitemoeshared", "bailingmoe2": "glm4_moe", "qwen3vlmoe": "qwen3_moe"}
# What makes the tiny models such as llama.cpp takes them.
OVERRIDES: dict[str, dict[str, object]] = {
    "qwen3_next": {"mlp_only_layers": [], "linear_value_head_dim": 8},
    "qwen3_5_moe": {"linear_value_head_dim": 8, "head_dim": 256},
    "glm4_moe": {"n_group": 1, "topk_group": 1}, "ernie4_5_moe": {"moe_num_shared_experts": 1},
    "dots1": {"sliding_window": None, "layer_types": ["full_attention"] * 3, "num_key_value_heads": 4},
    "bailingmoe": {
        "shared_intermediate_size": 40, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
        "attention_multiplier": 12**-0.5, "tie_word_embeddings": False,
    },
    "bailingmoe2": {"n_group": 2, "topk_group": 1, "attention_bias": False, "use_qk_norm": True, "head_dim": 12},
    "qwen3vlmoe": {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
    "llama4": {"attention_chunk_size": 8192}, "kimi_linear": {"num_expert_group": 1, "topk_group": 1},
}  # fmt: skip
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
Named = Iterator[tuple[str, torch.Tensor]]


def make(name: str) -> PreTrainedModel:
    """The tiny model of a family, in float32."""
    known, family = vars(families)["FAMILIES"], _FAMILIES.get(name, name)
    if family not in known:
        known[family] = vars(adapted_families)["_DECODERS"][family]
    return families.build(family, overrides=OVERRIDES.get(name, {})).float()


def write(path: Path, name: str, model: PreTrainedModel) -> None:
    """The model's file."""
    metadata = dict(METADATA[name])
    architecture = metadata.pop("general.architecture")
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    if name in ("bailingmoe", "bailingmoe2"):  # the map knows the names of their own published tensors alone
        arch = gguf.MODEL_ARCH.GRANITE_MOE if name == "bailingmoe" else gguf.MODEL_ARCH.GLM4_MOE
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("no_vocab")
    for key, value in metadata.items():
        _add(writer, f"{architecture}.{key}", value)
    for key, tensor in converted(name, model):
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target or key, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def converted(name: str, model: PreTrainedModel) -> Named:
    """Published tensors, changed and under names that the gguf package's map knows, or the file's own names."""
    stacked: dict[str, list[torch.Tensor]] = {}
    change = _CHANGES.get(name, _unchanged)
    if name == "bailingmoe2":
        change = _bailing2()
    for key, tensor in _published(model).items():
        if match := _EXPERT.fullmatch(key):
            stacked.setdefault(f"{match[1]}.{match[3]}.weight", []).append(tensor)
        elif key.endswith(("e_score_correction_bias", "expert_bias")):
            yield (key.removesuffix("_bias") if "score" in key else key) + ".bias", tensor
        else:
            yield from change(key, tensor, model.config)
    for key, tensors in stacked.items():
        yield key.replace("model.layers", "layers") if "feed_forward" in key else key, torch.stack(tensors)


def _unchanged(key: str, tensor: torch.Tensor, config: Any) -> Named:
    yield key, tensor


def _turned(key: str, tensor: torch.Tensor, config: Any) -> Named:
    heads = config.num_attention_heads if ".q_proj" in key else config.num_key_value_heads
    if re.search(r"\.(q|k)_proj\.", key):
        tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    yield key, tensor


def _granite(key: str, tensor: torch.Tensor, config: Any) -> Named:
    if key.endswith("input_linear.weight"):
        layer = re.search(r"\d+", key)
        assert layer is not None
        suffix = "exps" if "block_sparse_moe" in key else "shexp"
        for part, half in zip(("gate", "up"), tensor.chunk(2, dim=-2), strict=True):
            yield f"blk.{layer[0]}.ffn_{part}_{suffix}.weight", half
    else:
        yield from _turned(key, tensor, config)


def _latent(key: str, tensor: torch.Tensor, config: Any) -> Named:
    if not key.endswith("kv_b_proj.weight"):
        yield key, tensor
        return
    heads = config.num_attention_heads
    both = tensor.view(heads, config.qk_nope_head_dim + config.v_head_dim, -1)
    keys, values = both.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    yield key.replace("kv_b_proj", "k_b_proj"), keys.transpose(1, 2)
    yield key.replace("kv_b_proj", "v_b_proj"), values


def _convolution(key: str, tensor: torch.Tensor, config: Any) -> Named:
    yield key, tensor.squeeze(1) if "conv.conv" in key else tensor


def _kimi(key: str, tensor: torch.Tensor, config: Any) -> Named:
    if key.endswith("conv1d.weight"):
        tensor = tensor.reshape(1, len(tensor), 1, -1)
    key = key.replace(".dt_bias", ".dt_proj.bias")
    if re.search(r"block_sparse_moe\.(gate|up|down)_proj", key):  # a dense layer, published as `mlp`
        key = key.replace("block_sparse_moe", "mlp")
    yield from _latent(key, -torch.exp(tensor) if key.endswith("A_log") else tensor, config)


def _delta_net(key: str, tensor: torch.Tensor, config: Any) -> Named:
    """Qwen3-Next: q, k, v and z apart, norms with 1 added, decays as -exp."""
    if "in_proj_qkvz" in key:
        layer, heads = re.search(r"\d+", key), config.linear_num_key_heads
        assert layer is not None
        size = config.linear_key_head_dim
        values = config.linear_value_head_dim * config.linear_num_value_heads // heads
        parts = tensor.view(heads, -1, tensor.shape[1]).split([size, size, values, values], dim=1)
        query, keys, value, z = (part.flatten(0, 1) for part in parts)
        yield f"blk.{layer[0]}.attn_qkv.weight", torch.cat([query, keys, value])
        yield f"blk.{layer[0]}.attn_gate.weight", z
        return
    if key.endswith("norm.weight") and not key.endswith("linear_attn.norm.weight"):
        tensor = tensor + 1
    tensor = -torch.exp(tensor) if key.endswith("A_log") else tensor.squeeze(1) if "conv1d" in key else tensor
    yield key.replace(".dt_bias", ".dt_proj.bias"), tensor


def _tiled(key: str, tensor: torch.Tensor, config: Any) -> Named:
    """Qwen3.5: as Qwen3-Next, with the first value head of every group before the second ones."""
    groups, key_size, size = config.linear_num_key_heads, config.linear_key_head_dim, config.linear_value_head_dim
    if "linear_attn." in key and not key.endswith("linear_attn.norm.weight"):
        axis = 1 if ".out_proj." in key else 0
        first = 2 * groups * key_size if "in_proj_qkv." in key or "conv1d" in key else 0
        each = size if re.search(r"qkv|in_proj_z|conv1d|out_proj", key) else 1
        kept, rest = tensor.split([first, tensor.shape[axis] - first], dim=axis)
        tiled = rest.unflatten(axis, (groups, -1, each)).transpose(axis, axis + 1).flatten(axis, axis + 2)
        tensor = torch.cat([kept, tiled], dim=axis)
    yield from _delta_net(key, tensor, config)


def _bailing2() -> Callable[[str, torch.Tensor, Any], Named]:
    """Queries, keys and values in one matrix, as published."""
    parts: dict[str, torch.Tensor] = {}

    def change(key: str, tensor: torch.Tensor, config: Any) -> Named:
        match = re.search(r"layers\.(\d+)\.self_attn\.(q|k|v)_proj\.weight", key)
        if match is None:
            yield re.sub(r"model\.layers\.(\d+)\.post_attention_layernorm", r"blk.\1.ffn_norm", key), tensor
            return
        parts[match[2]] = tensor
        if len(parts) == 3:
            yield f"blk.{match[1]}.attn_qkv.weight", torch.cat([parts.pop(part) for part in "qkv"])

    return change


def _dbrx(key: str, tensor: torch.Tensor, config: Any) -> Named:
    ffn = config.ffn_config
    if "experts.mlp" not in key:
        yield key, tensor
        return
    stacked = tensor.view(ffn.moe_num_experts, ffn.ffn_hidden_size, config.d_model)
    yield key + ".weight", stacked.transpose(1, 2) if key.endswith("w2") else stacked


def _llama4(key: str, tensor: torch.Tensor, config: Any) -> Named:
    if key.endswith("experts.gate_up_proj"):
        for part, half in zip(("gate", "up"), tensor.transpose(1, 2).chunk(2, dim=1), strict=True):
            yield key.replace("gate_up_proj", f"{part}_proj.weight"), half
    elif key.endswith("experts.down_proj"):
        yield key + ".weight", tensor.transpose(1, 2)
    else:
        yield key, tensor


_CHANGES: dict[str, Callable[[str, torch.Tensor, Any], Named]] = {
    "qwen3_next": _delta_net, "qwen3_5_moe": _tiled, "lfm2_moe": _convolution, "granitemoe": _granite,
    "granitemoeshared": _granite, "bailingmoe": _granite, "glm4_moe_lite": _latent, "deepseek_v3": _latent,
    "kimi_linear": _kimi, "dbrx": _dbrx, "llama4": _llama4, "mixtral": _turned,
}  # fmt: skip
