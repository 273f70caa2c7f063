"""Attention with sinks (gpt-oss and kin) by torch's fused operation, which knows none, without its scores in memory.

A sink is one more number in the denominator of each softmax: exp(sink). transformers writes all scores out for it: for
512 tokens against 2,048 in gpt-oss's shape 134 MB and more, so a prompt had to go in small pieces, and each piece read
all experts again. The fused operation tells the logarithm L of its denominator beside its result O, so the result with
the sink is O * exp(L) / (exp(L) + exp(sink)) = O * sigmoid(L - sink), to the last bits in float32. Nothing is copied.

A family is taken where each of its attention modules hands everything to its own `eager_attention_forward`, and ours
gives what that function gives for random rows and sinks. It stays for what is not of this kind: on a device, where
gradients are wanted, and under torch.compile.
"""

from __future__ import annotations

import copy
import inspect
import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from offmoe.attention.token import token_attention
from offmoe.hf.masks import mask_sees_all
from offmoe.hf.replace import agree
from offmoe.kernels.row_blocks import active_blocks

SINKS = "offmoe_sinks"
EAGER = "eager"
_MARK = "_offmoe_sinks"
# What a family's function is given beside keyword arguments that it does not read.
_PARAMETERS = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "kwargs"}
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError, ZeroDivisionError)
# Tokens that are multiplied at once: torch does it by copies in float32.
_FEW = 256
_CHECKED_TOKENS, _CHECKED_CONTEXT = 5, 11

Attended = tuple[torch.Tensor, torch.Tensor | None]


def fuse_sinks(model: PreTrainedModel) -> None:
    """Let the attention modules of `model` compute this way, where all can. Weights may be on meta."""
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) != EAGER:
        return
    users = [module for module in model.modules() if _calls(module, "ALL_ATTENTION_FUNCTIONS")]
    users = [module for module in users if getattr(module, "config", None) is config]
    if not any(isinstance(getattr(module, "sinks", None), torch.Tensor) for module in users):
        return
    functions = [_own_function(module) for module in users]
    if None in functions or any(map(_asks_for_names, model.modules())):
        return
    if not all(_agrees(module, eager, model.dtype) for module, eager in zip(users, functions, strict=True)):
        return
    for module, eager in zip(users, functions, strict=True):
        setattr(module, _MARK, eager)
    AttentionInterface.register(SINKS, _attention)
    AttentionMaskInterface.register(SINKS, AttentionMaskInterface()[EAGER])
    config._attn_implementation = SINKS


def has_fused_sinks(module: nn.Module) -> bool:
    """Its attention is computed here."""
    return hasattr(module, _MARK)


def _calls(module: nn.Module, name: str) -> bool:
    return name in getattr(getattr(_forward_of(module), "__code__", None), "co_names", ())


def _forward_of(module: nn.Module) -> Any:
    """The family's own forward, below the decorators that transformers 5.24 puts around it for renamed arguments."""
    return inspect.unwrap(type(module).forward)


def _asks_for_names(module: nn.Module) -> bool:
    """Its code does something else for another name of the attention function than "eager"."""
    if not _calls(module, "_attn_implementation"):
        return False
    flat = [item for const in _forward_of(module).__code__.co_consts for item in _items(const)]
    return EAGER in flat or "sdpa" in flat


def _items(const: object) -> tuple[object, ...]:
    return const if isinstance(const, tuple) else (const,)


def _own_function(module: nn.Module) -> Any:
    """The family's eager function; None where the module has none of the known kind."""
    forward = _forward_of(module)
    eager = forward.__globals__.get("eager_attention_forward") if isinstance(forward, types.FunctionType) else None
    if eager is None or set(inspect.signature(eager).parameters) != _PARAMETERS:
        return None
    return eager


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **options: Any,
) -> Attended:  # fmt: skip
    """An attention function of transformers: queries (B, H, T, K), keys and values of G shared heads (B, G, S, .)."""
    plain = query.device.type == "cpu" and not options.get("dropout") and not options.get("output_attentions")
    # The fused operation takes masks that are added.
    fitting = attention_mask is None or (attention_mask.dtype == query.dtype and attention_mask.dim() == 4)
    if not plain or not fitting or torch.is_grad_enabled() or torch.compiler.is_compiling():
        result: Attended = getattr(module, _MARK)(module, query, key, value, attention_mask, **options)
        return result
    sinks, scaling, one = getattr(module, "sinks", None), options["scaling"], token_attention(module)

    def fused() -> torch.Tensor:
        return _fused(query, key, value, attention_mask, scaling, sinks)

    blocks = active_blocks()
    if blocks is not None:
        mask = query.new_zeros(1, 1, query.shape[2], key.shape[2]) if attention_mask is None else attention_mask
        return blocks.attend(
            lambda q, k, v, seen: _fused(q, k, v, seen, scaling, sinks), query, key, value, mask, rows_dim=1
        ), None  # fmt: skip
    if one is not None and one.takes(query, key, value, sinks) and mask_sees_all(attention_mask):
        return one.attend(query, key, value, scaling, fused, sinks), None
    return fused(), None


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The heads' results, (B, T, H, V)."""
    width = value.shape[-1]
    if width < key.shape[-1]:
        value = functional.pad(value, (0, key.shape[-1] - width))
    out, log_sums_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=scaling
    )
    if sinks_H is not None:
        shares_BHT = torch.sigmoid(log_sums_BHT - sinks_H.float()[:, None])
        for some, share in zip(out.split(_FEW, dim=2), shares_BHT.split(_FEW, dim=2), strict=True):
            some *= share[..., None]
    result: torch.Tensor = out[..., :width].transpose(1, 2).contiguous()
    return result


@torch.inference_mode()
def _agrees(module: Any, eager: Any, dtype: torch.dtype) -> bool:
    """Ours gives what theirs gives in float32: to its last bits there, up to rounding in the model's type."""
    random = torch.Generator().manual_seed(0)
    stand_in = copy.copy(module)
    try:
        key_width = int(module.head_dim)
        groups, value_width = int(module.num_key_value_groups), int(getattr(module, "v_head_dim", key_width))
        sinks = module.sinks if module.sinks is None else torch.randn(module.sinks.shape, generator=random) * 2
        heads = groups if sinks is None else sinks.numel()
        if sinks is not None:
            stand_in._parameters = {**module._parameters, "sinks": nn.Parameter(sinks, requires_grad=False)}

        def rows(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random).to(dtype)

        query = rows(1, heads, _CHECKED_TOKENS, key_width)
        key, value = (rows(1, heads // groups, _CHECKED_CONTEXT, width) for width in (key_width, value_width))
        seen = torch.ones(_CHECKED_TOKENS, _CHECKED_CONTEXT).tril(_CHECKED_CONTEXT - _CHECKED_TOKENS).triu(3)
        mask = torch.zeros(1, 1, *seen.shape).masked_fill(seen == 0, torch.finfo(dtype).min)
        scaling = float(module.scaling)
        exact = (query.float(), key.float(), value.float(), mask)
        expected = eager(stand_in, *exact, scaling=scaling, dropout=0.0)[0]
        ours = _fused(*exact, scaling, sinks)
        typed = _fused(query, key, value, mask.to(dtype), scaling, sinks)
    except _FAILURES:
        return False
    return agree(ours, expected) and agree(typed, expected.to(dtype))
