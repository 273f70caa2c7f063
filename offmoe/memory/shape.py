"""A model's widths and counts, from the numbers of its config: what the loader and the planner size memory with.

The loader hands in transformers' config as a dict, the planner config.json as it was published. Both have the same
names; where a published config leaves one out, its default here is that of the families that leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offmoe.core.errors import CheckpointError
from offmoe.memory.family_facts import ATTENTION_KINDS, experts_per_token

# So many tokens attend to latents as they are; for more, keys and values are expanded (attention/latent.py).
MAX_ABSORBED_TOKENS = 64
# The matrix that expands them, in every family's checkpoints: values in RAM, however it is stored.
LATENT_MATRIX = "kv_b_proj"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Widths in numbers, `item_bytes` of one number; `num_groups` of heads that share keys and values.

    `score_bytes`: what the scores of one token for another take where they are written out; `device_score_bytes`: on a
    device. `context_bytes` and `device_context_bytes`: what one cached token takes while a prompt attends to it, beside
    the cache. `latent_width` of the latent that is cached instead of keys and values; 0: none. `has_recurrence`: some
    layers keep a running state, and compute in float32. `largest_matrix_bytes` is that of the resident matrices but
    embedding and head.
    """

    width: int
    num_heads: int
    num_groups: int
    head_width: int
    dense_width: int
    expert_width: int
    top_k: int
    vocab_size: int
    item_bytes: int
    score_bytes: int
    device_score_bytes: int
    context_bytes: int
    device_context_bytes: int
    latent_width: int
    has_recurrence: bool
    largest_matrix_bytes: int


def shape_of(
    config: Mapping[str, Any], *, item_bytes: int, eager_attention: bool, eager_on_device: bool,
    largest_matrix_bytes: int,
) -> ModelShape:  # fmt: skip
    """The shape of the text model that `config` (with `text_config` or without) describes.

    `eager_attention`: transformers' plain form, which writes scores out; `eager_on_device` where a device computes.
    """
    text = text_config(config)
    width = largest_number(text, "hidden_size", 1)
    heads = largest_number(text, "num_attention_heads", 1)
    latent_width = largest_number(text, "qk_nope_head_dim", 0) + largest_number(text, "qk_rope_head_dim", 0)
    head_width = max(largest_number(text, "head_dim", width // heads), latent_width)
    dense = max(
        largest_number(text, "intermediate_size", width), largest_number(text, "shared_expert_intermediate_size", 0)
    )
    return ModelShape(
        width=width,
        num_heads=heads,
        num_groups=min(heads, largest_number(text, "num_key_value_heads", heads)),
        head_width=head_width,
        dense_width=dense,
        expert_width=largest_number(text, "moe_intermediate_size", dense),
        top_k=experts_per_token(text) or 1,
        vocab_size=largest_number(text, "vocab_size", 1),
        item_bytes=item_bytes,
        score_bytes=_score_bytes(text, heads, item_bytes, eager=eager_attention, on_device=False),
        device_score_bytes=_score_bytes(text, heads, item_bytes, eager=eager_on_device, on_device=True),
        context_bytes=item_bytes * heads * _context_width(text, head_width, copies_heads=eager_attention),
        device_context_bytes=item_bytes * heads * _context_width(text, head_width, copies_heads=True),
        latent_width=_latent_width(text),
        has_recurrence=any(kind not in ATTENTION_KINDS for kind in layer_kinds(text)),
        largest_matrix_bytes=largest_matrix_bytes,
    )


def _score_bytes(text: Mapping[str, Any], heads: int, item_bytes: int, *, eager: bool, on_device: bool) -> int:
    # A sparse attention's indexer: float32, and once more as it scales them.
    indexer = 2 * 4 * largest_number(text, "index_n_heads", 0)
    if eager:  # the scores, masked ones, and their softmax in float32
        return indexer + heads * (2 * item_bytes + 4)
    # A device's fused attention may take no values that are narrower than the keys: then torch writes scores and their
    # softmax, in float32. On the CPU attention/sdpa.py avoids it.
    if on_device and _has_narrow_values(text):
        return indexer + heads * (2 * 4 + item_bytes)
    return indexer


def _has_narrow_values(text: Mapping[str, Any]) -> bool:
    keys = largest_number(text, "qk_nope_head_dim", 0) + largest_number(text, "qk_rope_head_dim", 0)
    return 0 < largest_number(text, "v_head_dim", keys) < keys


def _latent_width(text: Mapping[str, Any]) -> int:
    latent = largest_number(text, "kv_lora_rank", 0)
    return latent + largest_number(text, "qk_rope_head_dim", 0) if latent else 0


def _context_width(text: Mapping[str, Any], head_width: int, *, copies_heads: bool) -> int:
    """Numbers that attention writes for each query head and cached token."""
    heads = largest_number(text, "num_attention_heads", 1)
    if _latent_width(text):  # a cached latent becomes keys and values, and keys with positions
        value_width = largest_number(text, "v_head_dim", head_width)
        padded = head_width if _has_narrow_values(text) else 0
        return largest_number(text, "qk_nope_head_dim", 0) + value_width + head_width + padded
    if copies_heads and largest_number(text, "num_key_value_heads", heads) < heads:
        return 2 * head_width
    return 0


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    for name in ("text_config", "llm_config", "language_config"):
        found = config.get(name)
        if isinstance(found, Mapping):
            return found
    return config


def layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """`layer_types`, or what other keys of a published config say of them; empty: all layers alike."""
    kinds = config.get("layer_types")
    if isinstance(kinds, (list, tuple)) and all(isinstance(kind, str) for kind in kinds):
        return list(kinds)
    num_layers = largest_number(config, "num_hidden_layers", 0)
    every = largest_number(config, "full_attention_interval", 0)
    if every and num_layers <= 10_000:
        return ["full_attention" if layer % every == every - 1 else "linear_attention" for layer in range(num_layers)]
    return []


def largest_number(config: Mapping[str, Any], name: str, default: int) -> int:
    """The largest value that `name` has anywhere in the config (it may differ by layer), or `default`.

    Raises CheckpointError for an infinite one, or one that is no number.
    """

    def largest(value: Any, inside: bool) -> float:
        if isinstance(value, Mapping):
            return max((largest(item, inside or key == name) for key, item in value.items()), default=0)
        if isinstance(value, (list, tuple)):
            return max((largest(item, inside) for item in value), default=0)
        if inside and isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(
                f"config.json has {name} = {value}, which is no number of anything; download it again"
            )
        return value if inside and isinstance(value, (int, float)) else 0

    return int(largest(config, inside=False)) or default
