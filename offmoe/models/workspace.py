"""How much memory one forward pass needs beside weights and KV cache, from the config's numbers.

An upper estimate, in bytes, of what is alive at once in the widest place of a layer. Measured peaks are below it
(benchmarks/ holds the comparison); the executor bounds its own part by computing expert by expert.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

PREFILL_CHUNKS = (4096, 2048, 1024, 512, 256, 128, 64)
# Of what weights and KV leave, the share that a prefill chunk may take; the rest is for expert slots.
MAX_WORKSPACE_SHARE = 0.06


def workspace_bytes(model: PreTrainedModel, *, chunk: int, context_length: int, on_device: bool = False) -> int:
    """Peak of temporaries for `chunk` tokens against `context_length` cached ones, where the model computes."""
    config = model.config.get_text_config()
    item = model.dtype.itemsize
    width = _number(config, "hidden_size", 1)
    heads = _number(config, "num_attention_heads", 1)
    head_dim = max(
        _number(config, "head_dim", width // heads),
        _number(config, "qk_nope_head_dim", 0) + _number(config, "qk_rope_head_dim", 0),
    )
    dense = max(_number(config, "intermediate_size", width), _number(config, "shared_expert_intermediate_size", 0))
    top_k = _top_k(config)
    # Hidden states: residual, normed copy in float32 and its square, block input and output.
    hidden = chunk * width * (4 * item + 3 * 4)
    # Queries, keys, values before and after rotary embedding, attention output.
    attention = chunk * heads * head_dim * item * 8
    # The mask, as bool and as float; with eager attention also the scores, twice, and their float32 softmax.
    mask = chunk * context_length * (1 + item)
    if getattr(config, "_attn_implementation", "sdpa") == "eager":
        attention += chunk * context_length * heads * (2 * item + 4)
    # Experts' outputs for every choice, the sort, and one expert's own activations for at most `chunk` rows.
    experts = (
        chunk * top_k * (width * item + 32)
        + chunk * (width + 4 * _number(config, "moe_intermediate_size", dense)) * item
    )
    mlp = chunk * dense * item * 4
    # Linear-attention and state-space layers run in float32 here.
    if any(kind not in ("full_attention", "sliding_attention") for kind in getattr(config, "layer_types", None) or ()):
        attention += chunk * max(heads * head_dim, 2 * width) * 4 * 12
    vocab = _number(config, "vocab_size", 1)
    logits = vocab * (item + 4 * 4)
    peak: int = hidden + mask + max(attention, experts, mlp) + experts // 2 + logits
    if not on_device:
        # oneDNN reorders a matrix before a product of many rows: at most the largest resident one but embedding and
        # head.
        peak += max((p.nbytes for p in model.parameters() if p.dim() == 2 and vocab not in p.shape), default=0)
    return peak


def host_workspace_bytes(model: PreTrainedModel, *, chunk: int) -> int:
    """Peak of temporaries in RAM when the model is on a device: states and results of experts computed on the CPU."""
    config = model.config.get_text_config()
    item = model.dtype.itemsize
    width = _number(config, "hidden_size", 1)
    expert_width = _number(config, "moe_intermediate_size", _number(config, "intermediate_size", width))
    num_bytes: int = chunk * (_top_k(config) * width + 2 * width + 4 * expert_width) * item
    return num_bytes


def choose_chunk(model: PreTrainedModel, *, context_length: int, room_bytes: int, on_device: bool = False) -> int:
    """The largest prefill chunk whose workspace stays under its share of `room_bytes`; larger ones read fewer bytes."""
    for chunk in PREFILL_CHUNKS:
        if (
            chunk < 2 * context_length
            and workspace_bytes(
                model, chunk=min(chunk, context_length), context_length=context_length, on_device=on_device
            )
            <= MAX_WORKSPACE_SHARE * room_bytes
        ):
            return min(chunk, context_length)
    return min(PREFILL_CHUNKS[-1], context_length)


def _top_k(config: PreTrainedConfig) -> int:
    return max(_number(config, name, 1) for name in ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"))


def _number(config: PreTrainedConfig, name: str, default: int) -> int:
    """The largest value that `name` has anywhere in the config (it may differ by layer), or `default`."""

    def largest(value: Any, inside: bool) -> float:
        if isinstance(value, dict):
            return max((largest(item, inside or key == name) for key, item in value.items()), default=0)
        if isinstance(value, (list, tuple)):
            return max((largest(item, inside) for item in value), default=0)
        return value if inside and isinstance(value, (int, float)) else 0

    return int(largest(config.to_dict(), inside=False)) or default
