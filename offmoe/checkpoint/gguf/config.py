"""A GGUF file's metadata as the config.json that transformers expects. No torch, no transformers.

transformers' own reader knows few MoE architectures, and of those it leaves the experts' width to a default that is one
model's (5.23: qwen2_moe, qwen3_moe); so the table for all of them is here (`gguf_architectures`). Sizes come from the
tensors where they say them. Source of the keys: llama.cpp's converters,
https://github.com/ggml-org/llama.cpp/tree/master/conversion
"""

from __future__ import annotations

from typing import Any

from offmoe.checkpoint.gguf.architecture import Architecture
from offmoe.checkpoint.gguf.architectures import ARCHITECTURES, REFUSED
from offmoe.checkpoint.gguf.facts import GgufFacts
from offmoe.checkpoint.gguf.header import GgufHeader
from offmoe.checkpoint.gguf.rope import rope
from offmoe.core.errors import CheckpointError, UnsupportedModelError

# Advice on sampling: llama.cpp's name -> generation_config's, and the least and most that it may be.
_SAMPLING: dict[str, tuple[str, float, float]] = {
    "temp": ("temperature", 0.0, 1e6), "top_k": ("top_k", 0, 1 << 31), "top_p": ("top_p", 1e-6, 1.0),
    "min_p": ("min_p", 0.0, 1.0), "penalty_repeat": ("repetition_penalty", 1e-6, 1e6),
}  # fmt: skip


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """The config, as config.json has it. Raises UnsupportedModelError naming the known architectures for another one,
    or a key that changes the model's numbers and is not read, and CheckpointError for metadata that lack what is
    needed.
    """
    architecture = ARCHITECTURES.get(header.architecture)
    if architecture is None:
        raise _unknown(header.architecture)
    facts = GgufFacts(header)
    if not facts.number("expert_count", 0):
        raise UnsupportedModelError(
            f"the GGUF file holds a dense model ({header.architecture}): it has no experts to stream; use transformers "
            "or llama.cpp"
        )
    common = _common(facts, architecture)
    own = architecture.config(facts)
    facts.expect_usual("rope.dimension_count", common["head_dim"])
    facts.expect_usual("attention.value_length", common["head_dim"])
    facts.expect_usual("expert_gating_func", *architecture.gating)
    facts.expect_usual("expert_weights_norm", *architecture.norm)
    facts.refuse_unread()
    if architecture.is_whole:
        common = {name: value for name, value in common.items() if name.endswith("_token_id")}
    return common | own


def _unknown(name: str) -> UnsupportedModelError:
    if name in REFUSED:
        return UnsupportedModelError(
            f"the GGUF file holds the architecture {name!r}, which is not read: {REFUSED[name]}"
        )
    return UnsupportedModelError(
        f"the GGUF file holds the architecture {name!r}, which is not read yet (known: "
        f"{', '.join(ARCHITECTURES)}); use the safetensors version of the model"
    )


def gguf_sampling(header: GgufHeader) -> dict[str, float | bool]:
    """Sampling that the publisher advises (`general.sampling.*`), as in generation_config; empty where nothing is said.

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


def _common(facts: GgufFacts, architecture: Architecture) -> dict[str, Any]:
    metadata = facts.header.metadata
    num_layers = facts.num_layers()
    heads, width = facts.size("attention.head_count"), facts.size("embedding_length")
    (num_experts, expert_width), (vocab_size, stored_width) = facts.experts(), facts.shape("token_embd.weight")
    if width != stored_width:
        raise CheckpointError(
            f"the GGUF file says embedding_length {width}, its token_embd.weight has {stored_width} columns; get "
            "another conversion of the model"
        )
    used = facts.size("expert_used_count")
    if used > num_experts:
        raise CheckpointError(
            f"the GGUF file says expert_used_count {used}, there are {num_experts} experts; get another conversion of "
            "the model"
        )
    head = facts.size("attention.key_length", width // heads)
    rotated = facts.size("rope.dimension_count", head) if architecture.is_partial else head
    positions, dense = rope(facts, rotated=rotated), "blk.0.ffn_gate.weight"
    if rotated > head:
        raise CheckpointError(f"the GGUF file rotates {rotated} numbers of heads of {head}; at most all can be")
    if rotated < head:
        positions["partial_rotary_factor"] = rotated / head
    config: dict[str, Any] = {
        "hidden_size": width, "num_hidden_layers": num_layers, "num_attention_heads": heads,
        "num_key_value_heads": max(facts.numbers("attention.head_count_kv", num_layers, heads)), "head_dim": head,
        "max_position_embeddings": facts.size("context_length"), "rope_parameters": positions,
        "vocab_size": vocab_size, "tie_word_embeddings": "output.weight" not in facts.header.tensors,
        "num_experts_per_tok": used, "pad_token_id": None,
        "intermediate_size": facts.rows(dense) if facts.has(dense) else expert_width,
    }  # fmt: skip
    if facts.get("attention.layer_norm_rms_epsilon") is not None:
        config["rms_norm_eps"] = facts.positive("attention.layer_norm_rms_epsilon")
    for name in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int):
            config[f"{name}_token_id"] = token
    return config
