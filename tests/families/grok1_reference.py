"""Grok-1 in plain NumPy, float64, straight from the published architecture (xai-org/grok-1, model.py); no cache.

Reads the tensors of a checkpoint by the names of its Hugging Face conversion. Shares no code with offmoe.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def grok1_logits(ids: list[int], tensors: dict[str, Array], config: dict[str, Any]) -> Array:
    """(T, V) logits of one sequence."""
    embedding = tensors["model.embed_tokens.weight"]
    h = embedding[ids] * config["embedding_multiplier_scale"]
    for idx in range(config["num_hidden_layers"]):
        layer = {key.split(".", 3)[3]: t for key, t in tensors.items() if key.startswith(f"model.layers.{idx}.")}
        attended = attention(rms(h, layer["pre_attn_norm.scale"]), layer, config)
        h = h + rms(attended, layer["post_attn_norm.scale"])
        h = h + rms(experts(rms(h, layer["pre_moe_norm.scale"]), layer, config), layer["post_moe_norm.scale"])
    return rms(h, tensors["model.norm.scale"]) @ embedding.T * config["output_multiplier_scale"]


def rms(x: Array, scale: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotary(x: Array) -> Array:
    """(T, heads, width)."""
    width = x.shape[-1]
    phase = np.arange(len(x))[:, None] / 10000 ** (np.arange(0, width, 2) / width)
    phase = np.concatenate([phase, phase], axis=-1)[:, None]
    turned = np.concatenate([-x[..., width // 2 :], x[..., : width // 2]], axis=-1)
    return x * np.cos(phase) + turned * np.sin(phase)


def attention(x: Array, layer: dict[str, Array], config: dict[str, Any]) -> Array:
    heads, kv_heads, length = config["num_attention_heads"], config["num_key_value_heads"], len(x)
    query = rotary((x @ layer["attn.q_proj.weight"].T).reshape(length, heads, -1))
    key = rotary((x @ layer["attn.k_proj.weight"].T).reshape(length, kv_heads, -1))
    value = (x @ layer["attn.v_proj.weight"].T).reshape(length, kv_heads, -1)
    out = np.empty_like(query)
    for head in range(heads):
        group = head // (heads // kv_heads)
        logits = query[:, head] @ key[:, group].T * config["attn_output_multiplier"]
        logits = 30.0 * np.tanh(logits / 30.0)
        logits[np.triu_indices(length, 1)] = -1e30
        out[:, head] = softmax(logits) @ value[:, group]
    return out.reshape(length, -1) @ layer["attn.o_proj.weight"].T


def experts(x: Array, layer: dict[str, Array], config: dict[str, Any]) -> Array:
    shares = softmax(x @ layer["moe_block.gate.weight"].T)
    out = np.zeros_like(x)
    for token, row in enumerate(x):
        for expert in np.argsort(-shares[token])[: config["num_experts_per_tok"]]:
            name = f"moe_block.experts.{expert}"
            gate, up = layer[f"{name}.linear.weight"] @ row, layer[f"{name}.linear_v.weight"] @ row
            out[token] += shares[token, expert] * (layer[f"{name}.linear_1.weight"] @ (gelu(gate) * up))
    return out
