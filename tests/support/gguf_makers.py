"""Tiny GGUF files, written by the gguf package under its own names, and the transformers models that they hold.

What llama.cpp's converter does to tensors is done here: rows of rotated heads reordered (Mixtral), latent attention cut
in two, experts stacked. Types that the package quantises are its own work; of the others, whose quantisers are C++, the
codes are drawn at random: every block is a valid one.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from families import build
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

# Wide enough for blocks of 256.
WIDTHS: dict[str, object] = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
    "eos_token_id": None,
}  # fmt: skip
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)\.weight")
_RENAMED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A family's name here, in GGUF, and the attributes that its files take for granted."""

    family: str
    arch: gguf.MODEL_ARCH
    overrides: dict[str, object]


MODELS = {
    "llama": Made(family="mixtral", arch=gguf.MODEL_ARCH.LLAMA, overrides={"head_dim": 64}),
    "qwen2moe": Made(
        family="qwen2_moe", arch=gguf.MODEL_ARCH.QWEN2MOE,
        overrides={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "qwen3moe": Made(
        family="qwen3_moe", arch=gguf.MODEL_ARCH.QWEN3MOE,
        overrides={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "olmoe": Made(family="olmoe", arch=gguf.MODEL_ARCH.OLMOE, overrides={"norm_topk_prob": False, "clip_qkv": None}),
    "deepseek2": Made(family="deepseek_v2", arch=gguf.MODEL_ARCH.DEEPSEEK2, overrides={"topk_method": "greedy"}),
    "deepseek2 v3": Made(
        family="deepseek_v3", arch=gguf.MODEL_ARCH.DEEPSEEK2, overrides={"q_lora_rank": 32},
    ),
    "gpt-oss": Made(family="gpt_oss", arch=gguf.MODEL_ARCH.GPT_OSS, overrides={}),
}  # fmt: skip


def make_model(name: str, **overrides: object) -> PreTrainedModel:
    """The tiny model, in float32. `overrides` change attributes of its config."""
    made = MODELS[name]
    return build(made.family, overrides=WIDTHS | made.overrides | overrides)


def save_gguf(
    path: Path, name: str, model: PreTrainedModel, kinds: dict[str, Type], *, tokenizer: Path | None = None,
    sampling: dict[str, float] | None = None, more: Callable[[gguf.GGUFWriter], object] | None = None,
) -> None:  # fmt: skip
    """Write `model` with the types that `kinds` gives for "gate", "up", "down" experts and "dense" matrices (float32
    where it gives none; "down.0" is of layer 0 alone), and put the values that the file then has into `model`.
    `tokenizer`: the folder of a byte-level BPE that goes into the file. `sampling`: advice, by llama.cpp's names.
    `more` adds keys and tensors of its own.
    """
    arch = MODELS[name].arch
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _write_settings(writer, model)
    for key, value in (sampling or {}).items():
        getattr(writer, f"add_sampling_{key}")(value)
    _write_tokenizer(writer, tokenizer)
    if more is not None:
        more(writer)
    values: dict[str, torch.Tensor] = {}
    for key, tensor in _converted(name, model).items():
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert target is not None, f"{key=} has no name in GGUF"
        kind = _kind(key, tensor, kinds)
        codes = _encode(key, tensor.float().numpy(), kind)
        writer.add_tensor(target, codes, raw_dtype=kind)
        values[key] = torch.from_numpy(gguf.dequantize(codes, kind).astype(np.float32)).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _put_back(name, model, values)


def _kind(key: str, tensor: torch.Tensor, kinds: dict[str, Type]) -> Type:
    match = re.search(r"\.experts\.(gate|up|down)_proj\.weight", key)
    chosen = match[1] if match else "dense" if re.search(r"self_attn\.\w+_proj\.weight|shared|lm_head", key) else None
    layer = re.search(r"\.layers\.(\d+)\.", key)
    kind = kinds.get(f"{chosen}.{layer[1] if layer else ''}", kinds.get(chosen or "", Type.F32))
    fits = tensor.dim() > 1 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else Type.F32


def _encode(key: str, values: NDArray[np.float32], kind: Type) -> NDArray[Any]:
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        return _random_blocks(values.shape, kind, seed=len(key))


def _random_blocks(shape: tuple[int, ...], kind: Type, *, seed: int) -> NDArray[np.uint8]:
    """Every byte of the codes at random, and scales of a size that keeps the model's numbers in bounds."""
    columns, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // columns, size), dtype=np.uint8)
    places = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,), Type.Q2_K: (80, 82), Type.Q3_K: (108,)}
    for at in places.get(kind, (0,)):
        scale = rng.uniform(1e-4, 2e-4, blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def _converted(name: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The published tensors as the converter hands them to the name map."""
    config, tensors = model.config, _published(model)
    stacked: dict[str, list[torch.Tensor]] = {}
    found: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = _EXPERT.fullmatch(key)
        if match:
            leaf = _RENAMED.get(match[3], match[3])
            stacked.setdefault(f"{match[1].replace('block_sparse_moe', 'mlp')}.{leaf}.weight", []).append(tensor)
        elif name == "llama" and re.search(r"\.(q|k)_proj\.", key):
            heads = config.num_attention_heads if ".q_proj" in key else config.num_key_value_heads
            found[key] = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        elif key.endswith("kv_b_proj.weight"):
            heads = config.num_attention_heads
            both = tensor.view(heads, config.qk_nope_head_dim + config.v_head_dim, -1)
            keys, rest = both.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            found[key.replace("kv_b_proj", "k_b_proj")] = keys.transpose(1, 2).contiguous()
            found[key.replace("kv_b_proj", "v_b_proj")] = rest.contiguous()
        elif ".experts.gate_up_proj" in key:
            turned = tensor.transpose(1, 2) if tensor.dim() == 3 else tensor[:, :, None]
            for idx, part in enumerate(("gate", "up")):
                half = turned[:, idx::2].contiguous()
                suffix = "weight" if tensor.dim() == 3 else "bias"
                found[f"{key.rpartition('.')[0]}.{part}_proj.{suffix}"] = half if tensor.dim() == 3 else half[:, :, 0]
        elif key.endswith(".experts.down_proj"):
            found[f"{key}.weight"] = tensor.transpose(1, 2).contiguous()
        elif key.endswith(".experts.down_proj_bias"):
            found[key.replace("_bias", ".bias")] = tensor
        elif key.endswith(".sinks"):
            found[f"{key}.weight"] = tensor
        elif key.endswith("shared_expert_gate.weight"):
            found[key] = tensor[0]
        elif key.endswith("e_score_correction_bias"):
            found[key.replace("e_score_correction_bias", "e_score_correction.bias")] = tensor
        else:
            found[key] = tensor
    return found | {key: torch.stack(parts) for key, parts in stacked.items()}


def _put_back(name: str, model: PreTrainedModel, values: dict[str, torch.Tensor]) -> None:
    """The model with the values of the file: every published tensor is rebuilt from what was written."""
    config, tensors = model.config, _published(model)
    for key, tensor in tensors.items():
        match = _EXPERT.fullmatch(key)
        base = key.rpartition(".")[0]
        if match:
            leaf = _RENAMED.get(match[3], match[3])
            new = values[f"{match[1].replace('block_sparse_moe', 'mlp')}.{leaf}.weight"][int(match[2])]
        elif name == "llama" and re.search(r"\.(q|k)_proj\.", key):
            heads = config.num_attention_heads if ".q_proj" in key else config.num_key_value_heads
            new = values[key].view(heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        elif key.endswith("kv_b_proj.weight"):
            keys = values[key.replace("kv_b_proj", "k_b_proj")].transpose(1, 2)
            new = torch.cat([keys, values[key.replace("kv_b_proj", "v_b_proj")]], dim=1).reshape(tensor.shape)
        elif ".experts.gate_up_proj" in key:
            suffix = "weight" if tensor.dim() == 3 else "bias"
            halves = [values[f"{base}.{part}_proj.{suffix}"] for part in ("gate", "up")]
            joined = torch.stack(halves, dim=2).flatten(1, 2)
            new = joined.transpose(1, 2) if tensor.dim() == 3 else joined
        elif key.endswith(".experts.down_proj"):
            new = values[f"{key}.weight"].transpose(1, 2)
        elif key.endswith(".experts.down_proj_bias"):
            new = values[key.replace("_bias", ".bias")]
        elif key.endswith(".sinks"):
            new = values[f"{key}.weight"]
        elif key.endswith("e_score_correction_bias"):
            new = values[key.replace("e_score_correction_bias", "e_score_correction.bias")]
        else:
            new = values[key].view(tensor.shape)
        with torch.no_grad():
            tensor.copy_(new)
    _load_published(model, tensors)


def _published(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def _load_published(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        again: Any = type(model).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
    model.load_state_dict(again.state_dict())


def _write_tokenizer(writer: gguf.GGUFWriter, folder: Path | None) -> None:
    if folder is None:
        writer.add_tokenizer_model("no_vocab")
        return
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {idx: token for token, idx in described["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in described["added_tokens"]}
    tokens |= special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[idx] for idx in range(len(tokens))])
    writer.add_token_types([
        gguf.TokenType.CONTROL if idx in special else gguf.TokenType.NORMAL for idx in range(len(tokens))
    ])  # fmt: skip
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(tokens)).add_to_gguf(writer, quiet=True)


def _write_settings(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    config: Any = model.config
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_count(next(
        getattr(config, key) for key in ("num_local_experts", "n_routed_experts", "num_experts") if hasattr(config, key)
    ))  # fmt: skip
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if hasattr(config, "kv_lora_rank"):
        _write_latent(writer, config)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if config.model_type == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)


def _write_latent(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_head_count_kv(1)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    is_v3 = config.model_type == "deepseek_v3"
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if is_v3 else gguf.ExpertGatingFuncType.SOFTMAX)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    if is_v3:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
