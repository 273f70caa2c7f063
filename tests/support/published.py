"""Headers of published models, with their true names, types and shapes, in files that hold no weights.

A shard is its header and a hole: a folder of hundreds of gigabytes takes a few megabytes of disk. Shapes are those of
the models' own config.json and safetensors index on the hub; TOTAL_BYTES is `metadata.total_size` of the latter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchlib.families import build_config, tensor_specs

Tensor = tuple[str, str, tuple[int, ...]]  # name, type, shape
ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
SHARD_BYTES = 5_000_000_000

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
    "intermediate_size": 18432, "first_k_dense_replace": 3, "vocab_size": 129280, "max_position_embeddings": 163840,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip
GPT_OSS_120B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 36,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128,
    "num_experts_per_tok": 4, "experts_per_token": 4, "intermediate_size": 2880, "vocab_size": 201088,
    "sliding_window": 128, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(36)],
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
TOTAL_BYTES = {
    "mixtral-8x7b": 93405585408, "qwen3-30b-a3b": 61064245248, "gpt-oss-120b": 65248815744,
}  # fmt: skip


def write_published(name: str, folder: Path) -> Path:
    """The headers and config of `name` in `folder`."""
    config, tensors = published(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, Any]] = [{}]
    ends = [0]
    for tensor, dtype, shape in tensors:
        size = math.prod(shape) * ITEM_BYTES[dtype]
        if ends[-1] + size > SHARD_BYTES:
            shards.append({})
            ends.append(0)
        shards[-1][tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [ends[-1], ends[-1] + size]}
        ends[-1] += size
    weight_map = {}
    for idx, (header, end) in enumerate(zip(shards, ends, strict=True)):
        file_name = f"model-{idx + 1:05}-of-{len(shards):05}.safetensors"
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
        weight_map |= dict.fromkeys(header, file_name)
    index = {"metadata": {"total_size": sum(ends)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def published(name: str) -> tuple[dict[str, Any], Iterator[Tensor]]:
    """config.json and the tensors of `name`."""
    if name == "deepseek-v3":
        return DEEPSEEK_V3, _deepseek_v3()
    if name == "gpt-oss-120b":
        return GPT_OSS_120B, _gpt_oss()
    layers, vocab = {"mixtral-8x7b": (32, 32000), "qwen3-30b-a3b": (48, 151936)}[name]
    config = build_config(name, num_layers=layers, vocab_size=vocab, dtype="bfloat16")
    return config, ((spec.name, "BF16", spec.shape) for spec in tensor_specs(name, config))


def _fp8(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


def _deepseek_v3() -> Iterator[Tensor]:
    width, vocab = 7168, 129280
    yield "model.embed_tokens.weight", "BF16", (vocab, width)
    for layer in range(62):
        at = f"model.layers.{layer}."
        attention = at + "self_attn."
        yield from _fp8(attention + "q_a_proj", 1536, width)
        yield attention + "q_a_layernorm.weight", "BF16", (1536,)
        yield from _fp8(attention + "q_b_proj", 128 * 192, 1536)
        yield from _fp8(attention + "kv_a_proj_with_mqa", 576, width)
        yield attention + "kv_a_layernorm.weight", "BF16", (512,)
        yield from _fp8(attention + "kv_b_proj", 128 * 256, 512)
        yield from _fp8(attention + "o_proj", width, 128 * 128)
        yield at + "input_layernorm.weight", "BF16", (width,)
        yield at + "post_attention_layernorm.weight", "BF16", (width,)
        if layer < 3:
            yield from _fp8_mlp(at + "mlp.", width, 18432)
            continue
        yield at + "mlp.gate.weight", "BF16", (256, width)
        yield at + "mlp.gate.e_score_correction_bias", "F32", (256,)
        yield from _fp8_mlp(at + "mlp.shared_experts.", width, 2048)
        for expert in range(256):
            yield from _fp8_mlp(f"{at}mlp.experts.{expert}.", width, 2048)
    last = "model.layers.61."
    yield last + "embed_tokens.weight", "BF16", (vocab, width)
    yield last + "enorm.weight", "BF16", (width,)
    yield last + "hnorm.weight", "BF16", (width,)
    yield last + "eh_proj.weight", "BF16", (width, 2 * width)
    yield last + "shared_head.norm.weight", "BF16", (width,)
    yield last + "shared_head.head.weight", "BF16", (vocab, width)
    yield "model.norm.weight", "BF16", (width,)
    yield "lm_head.weight", "BF16", (vocab, width)


def _fp8_mlp(at: str, width: int, inner: int) -> Iterator[Tensor]:
    yield from _fp8(at + "gate_proj", inner, width)
    yield from _fp8(at + "up_proj", inner, width)
    yield from _fp8(at + "down_proj", width, inner)


def _gpt_oss() -> Iterator[Tensor]:
    width, experts, vocab = 2880, 128, 201088
    yield "model.embed_tokens.weight", "BF16", (vocab, width)
    for layer in range(36):
        at = f"model.layers.{layer}."
        for name, rows, columns in (("q", 4096, width), ("k", 512, width), ("v", 512, width), ("o", width, 4096)):
            yield f"{at}self_attn.{name}_proj.weight", "BF16", (rows, columns)
            yield f"{at}self_attn.{name}_proj.bias", "BF16", (rows,)
        yield at + "self_attn.sinks", "BF16", (64,)
        yield at + "input_layernorm.weight", "BF16", (width,)
        yield at + "post_attention_layernorm.weight", "BF16", (width,)
        yield at + "mlp.router.weight", "BF16", (experts, width)
        yield at + "mlp.router.bias", "BF16", (experts,)
        for name, rows in (("gate_up_proj", 2 * width), ("down_proj", width)):
            yield f"{at}mlp.experts.{name}_blocks", "U8", (experts, rows, width // 32, 16)
            yield f"{at}mlp.experts.{name}_scales", "U8", (experts, rows, width // 32)
            yield f"{at}mlp.experts.{name}_bias", "BF16", (experts, rows)
    yield "model.norm.weight", "BF16", (width,)
    yield "lm_head.weight", "BF16", (vocab, width)
