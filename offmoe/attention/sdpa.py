"""Attention as transformers' "sdpa" function computes it, in less memory and time.

That function copies keys and values to every query head where a mask is given, and torch writes all scores in float32
where values are narrower than keys (latent attention). On the CPU torch's fused operation needs neither: it reads
shared heads as they are, with the same bits as result, and values with zeros beside them. Measured with 512 tokens
against 2,048: 0.93x the time with shared heads; 0.53x for DeepSeek-V2-Lite's shape, whose scores took 420 MB. Few
tokens of a model that caches latents need no keys and values at all: attention/latent.py. One token's attention
is computed by the CPU kernels: attention/token.py.

The function is one for the process, so it asks each module whether it is ours; all others get transformers' own.
It keeps transformers' name: eight families of 5.23 (DeepSeek-V3.2, GLM-5, ...) say which keys a query may see in a mask
only where the name is "sdpa" or "eager".
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from offmoe.attention.latent import LatentAttention, find_latent_attention
from offmoe.attention.sinks import Attended, fuse_sinks, has_fused_sinks
from offmoe.attention.token import TokenAttention, set_token_attention, token_attention
from offmoe.hf.masks import mask_sees_all
from offmoe.hf.replace import agree
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.row_blocks import active_blocks

_NAME = "sdpa"
_MARK = "_offmoe_attention"
# Arguments that the fused operation is not given here.
_OTHERS = ("softcap", "position_bias", "cache", "output_attentions")


def save_memory(model: PreTrainedModel) -> None:
    """Let the attention modules of `model` that call "sdpa" compute this way. Those with sinks: sinks.py."""
    fuse_sinks(model)
    if getattr(model.config.get_text_config(), "_attn_implementation", None) != _NAME:
        return
    current = AttentionInterface()[_NAME]
    if not hasattr(current, _MARK):
        AttentionInterface.register(_NAME, _choosing(current))
    for module in model.modules():
        if hasattr(module, "is_causal"):
            setattr(module, _MARK, find_latent_attention(module))


@torch.inference_mode()
def absorb_latents(model: PreTrainedModel) -> None:
    """The weights are loaded: few tokens may attend to latents, where that is checked to give the same."""
    for module in model.modules():
        latent = getattr(module, _MARK, None)
        if latent is not None:
            latent.check(agree)


def attend_by_kernels(model: PreTrainedModel, kernels: CpuKernels) -> TokenAttention | None:
    """Let one token's attention be computed by the kernels, until that is closed; None: nobody asks for it."""
    modules = [module for module in model.modules() if hasattr(module, _MARK) or has_fused_sinks(module)]
    attention = TokenAttention(kernels)
    for module in modules:
        set_token_attention(module, attention)
    return attention if modules else None


def _choosing(theirs: Any) -> Any:
    def sdpa(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, **options: Any,
    ) -> Attended:  # fmt: skip
        latent: LatentAttention | None = getattr(module, _MARK, None)
        plain = not options.get("dropout") and all(options.get(n) is None or options[n] is False for n in _OTHERS)
        if latent is not None:
            if plain and active_blocks() is None and latent.takes(query, attention_mask):
                return latent.attend(query, key, value, attention_mask, options.get("scaling")), None
            key, value = latent.expand(key, value)
        if plain and hasattr(module, _MARK) and (query.shape[2] > 1 or active_blocks()) and query.device.type == "cpu":
            return _attend(theirs, module, query, key, value, attention_mask, **options)
        one = token_attention(module) if plain and active_blocks() is None else None
        if one is not None and one.takes(query, key, value, None) and mask_sees_all(attention_mask):
            return one.attend(
                query, key, value, options.get("scaling"),
                lambda: theirs(module, query, key, value, attention_mask, **options)[0],
            ), None  # fmt: skip
        result: Attended = theirs(module, query, key, value, attention_mask, **options)
        return result

    setattr(sdpa, _MARK, theirs)
    return sdpa


def _attend(
    theirs: Any, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **options: Any,
) -> Attended:  # fmt: skip
    """Queries (B, H, T, K), keys (B, G, S, K) and values (B, G, S, V) of G shared heads; returns (B, T, H, V)."""
    width = value.shape[-1]
    if width < key.shape[-1]:
        value = functional.pad(value, (0, key.shape[-1] - width))
    if attention_mask is None or key.shape[1] == query.shape[1]:  # theirs copies no heads then
        out, weights = theirs(module, query, key, value, attention_mask, **options)
        return out[..., :width].contiguous(), weights
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=options.get("scaling"), enable_gqa=True
    )
    return out[..., :width].transpose(1, 2).contiguous(), None
