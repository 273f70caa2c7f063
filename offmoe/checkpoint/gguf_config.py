"""A GGUF file's metadata as the config.json that transformers expects. No torch, no transformers.

transformers' own reader knows few MoE architectures, and of those it leaves the experts' width to a default that is one
model's (5.23: qwen2_moe, qwen3_moe); so the table for all of them is here. Sizes come from the tensors where they say
them. Source of the keys: llama.cpp's converters, https://github.com/ggml-org/llama.cpp/tree/master/conversion
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from offmoe.base.errors import CheckpointError, UnsupportedModelError
from offmoe.checkpoint.gguf import GgufHeader

_SIGMOID = 2  # llama.cpp's expert_gating_func
_MAX_SIZE = 1 << 40
_GATES = "blk.*.ffn_gate_exps.weight"
_OF_A_LAYER = re.compile(r"blk\.\d{1,5}\.")
# Advice on sampling: llama.cpp's name -> generation_config's, and the least and most that it may be.
_SAMPLING: dict[str, tuple[str, float, float]] = {
    "temp": ("temperature", 0.0, 1e6), "top_k": ("top_k", 0, 1 << 31), "top_p": ("top_p", 1e-6, 1.0),
    "min_p": ("min_p", 0.0, 1.0), "penalty_repeat": ("repetition_penalty", 1e-6, 1e6),
}  # fmt: skip


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """The config, as config.json has it. Raises UnsupportedModelError naming the known architectures for another one,
    and CheckpointError for metadata that lack what is needed.
    """
    make = ARCHITECTURES.get(header.architecture)
    if make is None:
        raise UnsupportedModelError(
            f"the GGUF file holds the architecture {header.architecture!r}, which is not read yet (known: "
            f"{', '.join(ARCHITECTURES)}); use the safetensors version of the model"
        )
    facts = _Facts(header)
    if not facts.number("expert_count", 0):
        raise UnsupportedModelError(
            f"the GGUF file holds a dense model ({header.architecture}): it has no experts to stream; use transformers "
            "or llama.cpp"
        )
    return _common(facts) | make(facts)


def gguf_sampling(header: GgufHeader) -> dict[str, float | bool]:
    """What the publisher advises (`general.sampling.*`), as generation_config has it; empty where nothing is said.

    Advice without a temperature means 1, a temperature of 0 greedy. What offmoe has no sampler for (mirostat, xtc) is
    left out. Raises CheckpointError for numbers that cannot be.
    """
    found: dict[str, float | bool] = {}
    for key, (name, least, most) in _SAMPLING.items():
        value = header.metadata.get(f"general.sampling.{key}")
        if value is None:
            continue
        kinds: tuple[type, ...] = (int,) if key == "top_k" else (int, float)
        if type(value) not in kinds or not least <= value <= most:
            raise CheckpointError(
                f"the GGUF file says general.sampling.{key} {value!r}; a number from {least:g} to {most:g} is needed"
            )
        found[name] = value
    if not found:
        return found
    greedy = found.get("temperature") == 0
    return ({name: value for name, value in found.items() if name != "temperature"} if greedy else found) | {
        "do_sample": not greedy
    }


class _Facts:
    """Metadata under the architecture's prefix, and shapes."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number from 0; a list that says one number for every layer counts as that number."""
        value = self.header.metadata.get(f"{self.header.architecture}.{key}", default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int or not 0 <= value < _MAX_SIZE:
            raise CheckpointError(f"the GGUF file says {key} {value!r}; a whole number is needed")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1."""
        found = self.number(key, default)
        if not found:
            raise CheckpointError(f"the GGUF file says {key} 0; at least 1 is needed")
        return found

    def count(self) -> tuple[int, int]:
        """(layers that are run, experts of a layer): as many as there are tensors for."""
        numbers = {int(name.split(".")[1]) for name in self.header.tensors if _OF_A_LAYER.match(name)}
        said, extra, found = self.size("block_count"), self.number("nextn_predict_layers", 0), max(numbers, default=-1)
        if not said - extra <= found + 1 <= said:
            raise CheckpointError(
                f"the GGUF file says block_count {said}, its tensors are of {found + 1} layers; download it again"
            )
        experts = self.shape(_GATES)[0]
        if (stated := self.number("expert_count")) != experts:
            raise CheckpointError(
                f"the GGUF file says expert_count {stated}, its tensors hold {experts}; download it again"
            )
        return said - extra, experts

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        found = self.real(key, default)
        if found <= 0:
            raise CheckpointError(f"the GGUF file says {key} {found!r}; a number above 0 is needed")
        return found

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.header.metadata.get(f"{self.header.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
            raise CheckpointError(f"the GGUF file says {key} {value!r}; a number is needed")
        return float(value)

    def get(self, key: str) -> Any:
        """Whatever is there, or None."""
        return self.header.metadata.get(f"{self.header.architecture}.{key}")

    def rows(self, name: str) -> int:
        """Rows of a tensor, or of one expert's matrix. `*` is the first layer that has it."""
        return self.shape(name)[-2]

    def shape(self, name: str) -> tuple[int, ...]:
        """A matrix's, or that of a stack of them for `_exps`."""
        pattern = re.compile(re.escape(name).replace(r"\*", r"\d{1,5}"))
        found = next((tensor.shape for key, tensor in self.header.tensors.items() if pattern.fullmatch(key)), ())
        if len(found) != (3 if "_exps." in name else 2):
            raise CheckpointError(
                f"the GGUF file has no tensor {name}, or one of shape {list(found)}; download it again"
            )
        return found

    def holds(self, name: str) -> bool:
        """Whether layer 0, which is dense where any is, has the tensor."""
        return f"blk.0.{name}" in self.header.tensors


def _common(facts: _Facts) -> dict[str, Any]:
    tensors, metadata = facts.header.tensors, facts.header.metadata
    heads, width, used = (
        facts.size("attention.head_count"),
        facts.size("embedding_length"),
        facts.size("expert_used_count"),
    )
    (num_layers, num_experts), (vocab_size, stored_width) = facts.count(), facts.shape("token_embd.weight")
    if width != stored_width:
        raise CheckpointError(
            f"the GGUF file says embedding_length {width}, its token_embd.weight has {stored_width} columns; download "
            "it again"
        )
    if used > num_experts:
        raise CheckpointError(
            f"the GGUF file says expert_used_count {used}, there are {num_experts} experts; download it again"
        )
    config: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": facts.size("attention.head_count_kv", heads),
        "head_dim": facts.size("attention.key_length", width // heads),
        "max_position_embeddings": facts.size("context_length"),
        "rms_norm_eps": facts.positive("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(facts),
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in tensors,
        "num_experts_per_tok": used,
        "intermediate_size": facts.rows("blk.*.ffn_gate.weight" if facts.holds("ffn_gate.weight") else _GATES),
    }
    for name in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int):
            config[f"{name}_token_id"] = token
    return config


def _rope(facts: _Facts) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.positive("rope.freq_base", 10000.0)}
    kind = facts.get("rope.scaling.type")
    if kind in (None, "none"):
        return rope
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"the GGUF file scales positions by {kind!r}, which is not read yet (linear, yarn are)"
        )
    rope |= {"rope_type": kind, "factor": facts.positive("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = facts.size("rope.scaling.original_context_length")
        rope["beta_fast"] = facts.real("rope.scaling.yarn_beta_fast", 32.0)
        rope["beta_slow"] = facts.real("rope.scaling.yarn_beta_slow", 1.0)
    return rope


def _mixtral(facts: _Facts) -> dict[str, Any]:
    return {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
        "num_local_experts": facts.number("expert_count"), "sliding_window": None,
        "intermediate_size": facts.rows(_GATES),
    }  # fmt: skip


def _qwen2_moe(facts: _Facts) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": facts.number("expert_count"),
        "moe_intermediate_size": facts.rows(_GATES),
        "shared_expert_intermediate_size": facts.rows("blk.*.ffn_gate_shexp.weight"), "norm_topk_prob": False,
        "qkv_bias": "blk.0.attn_q.bias" in facts.header.tensors,
    }  # fmt: skip


def _qwen3_moe(facts: _Facts) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": facts.number("expert_count"),
        "moe_intermediate_size": facts.rows(_GATES), "norm_topk_prob": True,
    }  # fmt: skip


def _olmoe(facts: _Facts) -> dict[str, Any]:
    if facts.get("attention.clamp_kqv") is not None:
        raise UnsupportedModelError("the GGUF file limits queries, keys and values (clamp_kqv), which is not read yet")
    return {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "num_experts": facts.number("expert_count"),
        "intermediate_size": facts.rows(_GATES), "norm_topk_prob": False,
    }  # fmt: skip


def _deepseek(facts: _Facts) -> dict[str, Any]:
    """DeepSeek-V2 where experts are scored by a softmax, V3 where they are by a sigmoid. Without a number of groups
    there is one, as in llama.cpp.
    """
    rotary = facts.size("rope.dimension_count")
    head = facts.size("attention.key_length_mla", facts.size("attention.key_length"))
    if head <= rotary:
        raise CheckpointError(f"the GGUF file says heads of {head} numbers, {rotary} of them rotated; more are needed")
    is_v3 = facts.number("expert_gating_func", 1) == _SIGMOID
    groups, used = facts.number("expert_group_count", 0), facts.number("expert_group_used_count", 0)
    multiplier = facts.real("rope.scaling.yarn_log_multiplier", 0.0) * 10.0
    rope = _rope(facts)
    if rope["rope_type"] == "yarn" and multiplier:
        rope |= {"mscale": multiplier, "mscale_all_dim": multiplier}
    heads = facts.number("attention.head_count")
    config = {
        "num_key_value_heads": heads, "head_dim": rotary, "rope_parameters": rope,
        "n_routed_experts": facts.number("expert_count"),
        "moe_intermediate_size": facts.rows(_GATES),
        "n_shared_experts": facts.number("expert_shared_count"), "kv_lora_rank": facts.size("attention.kv_lora_rank"),
        "q_lora_rank": facts.number("attention.q_lora_rank", 0) or None, "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": head - rotary,
        "v_head_dim": facts.size("attention.value_length_mla", facts.size("attention.value_length")),
        "first_k_dense_replace": facts.number("leading_dense_block_count", 0),
        "routed_scaling_factor": facts.real("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": bool(facts.get("expert_weights_norm")),
    }  # fmt: skip
    if is_v3:
        return config | {
            "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "n_group": max(1, groups),
            "topk_group": max(1, used), "num_nextn_predict_layers": 0,
        }  # fmt: skip
    grouped = {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": used} if groups > 1 else {}
    return config | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], **grouped}


def _gpt_oss(facts: _Facts) -> dict[str, Any]:
    rope = _rope(facts)
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False
    return {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"],
        "num_local_experts": facts.number("expert_count"),
        "intermediate_size": facts.rows(_GATES), "rope_parameters": rope,
        "sliding_window": facts.number("attention.sliding_window"),
    }  # fmt: skip


# llama.cpp's name -> the part of the config that is its own.
ARCHITECTURES: dict[str, Callable[[_Facts], dict[str, Any]]] = {
    "llama": _mixtral, "qwen2moe": _qwen2_moe, "qwen3moe": _qwen3_moe, "olmoe": _olmoe, "deepseek2": _deepseek,
    "gpt-oss": _gpt_oss,
}  # fmt: skip
