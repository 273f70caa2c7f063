"""Bytes of KV cache, from a config's keys alone: for plans made before a model is built.

The loader runs the model on eight tokens and counts; this is what it will find, for the kinds of attention that are
known here (a test compares both on every family), and an upper estimate with a note for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offmoe.memory.family_facts import ATTENTION_KINDS, STATE_KINDS
from offmoe.memory.shape import largest_number, layer_kinds, text_config

# The cache keeps the compressed latent and the shared rotary part, not the heads' own keys and values.
_LATENT = "kv_lora_rank"
# Layers of one kind have other heads than the rest, or the kinds are written as letters.
_OTHER_WIDTHS = (
    "global_head_dim", "per_layer_config", "swa_head_dim", "swa_num_key_value_heads", "hybrid_override_pattern",
    "layers_block_type",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KvEstimate:
    """Bytes for one sequence, how they were counted, and whether that is exact for plain layers."""

    num_bytes: int
    how: str
    is_exact: bool


def estimate_kv(config: Mapping[str, Any], *, item_bytes: int, context_length: int) -> KvEstimate:
    """The cache for `context_length` tokens, numbers of `item_bytes`; as kv/cache.py allocates it."""
    text = text_config(config)
    num_layers = largest_number(text, "num_hidden_layers", 0)
    kinds = layer_kinds(text)
    num_states = sum(kind in STATE_KINDS for kind in kinds)  # a few MB each, whatever the context
    is_odd = any(kind not in (*STATE_KINDS, *ATTENTION_KINDS) for kind in kinds)
    if not kinds and any(name in text for name in ("attn_layer_period", "mamba_d_state", "linear_attn_config")):
        is_odd = True
    is_odd |= any(name in text for name in _OTHER_WIDTHS) or ("v_head_dim" in text and _LATENT not in text)
    # Layers of transformers' own kinds concatenate: the old and the new copy are there at once.
    extra, copies = (largest_number(text, "index_head_dim", 0), 2) if is_odd else (0, 1)
    latent = largest_number(text, _LATENT, 0)
    if latent:
        per_token = latent + largest_number(text, "qk_rope_head_dim", 0) + extra
        num_bytes = (num_layers - num_states) * context_length * per_token * copies * item_bytes
        how = f"latent attention: {per_token} numbers a token and layer"
        return KvEstimate(num_bytes=num_bytes, how=_said(how, is_odd), is_exact=not is_odd and not num_states)
    heads = largest_number(text, "num_attention_heads", 1)
    kv_heads = largest_number(text, "num_key_value_heads", heads)
    head_width = largest_number(text, "head_dim", largest_number(text, "hidden_size", 1) // heads)
    per_token = kv_heads * (head_width + largest_number(text, "v_head_dim", head_width)) + extra
    window = _window(text, kinds)
    num_sliding = sum(kind == "sliding_attention" for kind in kinds) if kinds else (num_layers if window else 0)
    if not window:
        num_sliding = 0
    num_full = num_layers - num_states - num_sliding
    tokens = num_full * context_length + num_sliding * min(context_length, 2 * window)
    how = f"{kv_heads} key-value heads of {head_width}"
    how += f", {num_sliding} of {num_layers} layers see {window} tokens" if num_sliding else ""
    how += f", {num_states} of {num_layers} layers keep a state" if num_states else ""
    return KvEstimate(
        num_bytes=tokens * per_token * copies * item_bytes,
        how=_said(how, is_odd),
        is_exact=not is_odd and not num_states,
    )


def _window(text: Mapping[str, Any], kinds: list[str]) -> int:
    """Number of tokens that a sliding layer looks back; 0 where none does."""
    window = largest_number(text, "sliding_window", 0)
    if kinds:
        return window if "sliding_attention" in kinds else 0
    return window if text.get("use_sliding_window", True) else 0


def _said(how: str, is_odd: bool) -> str:
    return f"{how}; an estimate: this family's cache is only known when it runs" if is_odd else how
