"""Attention of one token by the CPU kernels, in place of some forty operations of torch.

A module is taken where its own code does nothing but project, norm, rotate, append to the cache, attend and project:
its `forward` is read, and one that calls anything else, or computes, is left alone. So what depends on the position,
the configuration or an argument cannot be overlooked. What the code does not say (which rotation, which scale) is seen
by comparing: the first tokens are computed both ways, and where the results differ the module keeps its own code.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from offmoe.kernels.cpu.decode import AttentionShape, CpuAttention, CpuNorm
from offmoe.models.kv_cache import Buffers
from offmoe.models.native import NativeModules, find_norm
from offmoe.models.native_token import ATTENTIONS, Masks, TokenStep, calls_only

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_KNOWN_CALLS = {
    *_PROJECTIONS, "q_norm", "k_norm", "view", "transpose", "reshape", "contiguous", "update", "get_interface",
    "attention_interface", "getattr",
}  # fmt: skip
_ROTATES = {"apply_rotary_pos_emb"}


def swap_attention(native: NativeModules, model: nn.Module) -> None:
    """Swap the attention of every layer that is understood."""
    plain: dict[tuple[type[nn.Module], int], bool] = {}
    masks = Masks()
    for module in model.modules():
        if not all(isinstance(getattr(module, name, None), nn.Linear) for name in _PROJECTIONS):
            continue
        config = getattr(module, "config", None)
        kind = (type(module), id(config))
        if kind not in plain:
            plain[kind] = _is_plain(type(module), config)
        if plain[kind]:
            step = _make_step(native, module, masks)
            if step is not None:
                native.swap(module, step, ATTENTIONS)


def _is_plain(attention: type[nn.Module], config: object = None) -> bool:
    """Its forward calls only what is known, and computes nothing by itself. What it does only where a number of
    `config` is set that is not (OLMoE: clips queries and keys) does not count.
    """
    return calls_only(attention, _KNOWN_CALLS, _ROTATES, lambda statement: _is_passed_by(statement, config))


def _is_passed_by(statement: ast.stmt, config: object) -> bool:
    """`if self.config.number is not None: ...`, and it is None."""
    if not isinstance(statement, ast.If) or statement.orelse:
        return False
    start, end = "self.config.", " is not None"
    name = ast.unparse(statement.test).removeprefix(start).removesuffix(end)
    same = ast.unparse(statement.test) == f"{start}{name}{end}"
    return same and name.isidentifier() and getattr(config, name, ...) is None


def _make_step(native: NativeModules, module: Any, masks: Masks) -> Callable[..., Any] | None:
    shape = _shape_of(module)
    norms = [_norm_of(native, module, name) for name in ("q_norm", "k_norm")]
    if shape is None or None in norms or (norms[0] is False) != (norms[1] is False):
        return None
    query_norm, key_norm = (norm or None for norm in norms)
    if query_norm is not None and key_norm is not None and not _alike(query_norm, key_norm, shape):
        return None
    sinks = getattr(module, "sinks", None)
    if sinks is not None and (sinks.dtype != shape.dtype or sinks.numel() != shape.num_heads):
        return None
    attention = CpuAttention(
        native.kernels, shape, query_norm=query_norm, key_norm=key_norm,
        sinks_H=None if sinks is None else sinks.detach().contiguous(),
    )  # fmt: skip
    return AttentionStep(native, module, attention, masks).forward


def _shape_of(module: Any) -> AttentionShape | None:
    """None where a parameter, a size or the scale is of another kind than is known."""
    width, scale = getattr(module, "head_dim", None), getattr(module, "scaling", None)
    params = {name for name, _ in module.named_parameters()}
    known = {f"{name}.{kind}" for name in (*_PROJECTIONS, "q_norm", "k_norm") for kind in ("weight", "bias")}
    sizes = [getattr(module, name).out_features for name in _PROJECTIONS[:3]]
    if not isinstance(width, int) or not isinstance(scale, float) or params - known - {"sinks"}:
        return None
    if any(size % width for size in sizes) or sizes[1] != sizes[2] or sizes[0] % sizes[1]:
        return None
    return AttentionShape(
        num_heads=sizes[0] // width, num_groups=sizes[1] // width, width=width, value_width=width, scale=scale,
        dtype=module.q_proj.weight.dtype,
    )  # fmt: skip


def _norm_of(native: NativeModules, module: nn.Module, name: str) -> CpuNorm | Literal[False] | None:
    """False: there is none. None: there is one that is not understood."""
    norm = getattr(module, name, None)
    if norm is None or isinstance(norm, nn.Identity):
        return False
    return find_norm(native.kernels, norm)


def _alike(query_norm: CpuNorm, key_norm: CpuNorm, shape: AttentionShape) -> bool:
    """Both by the same rule, over one head each or over all heads together."""
    widths = (query_norm.weight_D.numel(), key_norm.weight_D.numel())
    all_heads = (shape.num_heads * shape.width, shape.num_groups * shape.width)
    same = (query_norm.eps, query_norm.kind) == (key_norm.eps, key_norm.kind)
    return same and widths in ((shape.width, shape.width), all_heads)


class AttentionStep(TokenStep):
    """`half_angles` is None until a token was computed both ways."""

    def __init__(self, native: NativeModules, module: Any, attention: CpuAttention, masks: Masks) -> None:
        super().__init__(native, module, masks)
        self.attention = attention
        self.half_angles: bool | None = None

    def run(self, hidden: torch.Tensor, angles: Any, rows: Buffers) -> torch.Tensor:
        """As of TokenStep."""
        module, (cos, sin), (keys, values) = self.module, angles, rows
        query, key, value = module.q_proj(hidden), module.k_proj(hidden), module.v_proj(hidden)
        heads = self.attention(query, key, value, cos, sin, keys[0], values[0], half_angles=bool(self.half_angles))
        output: torch.Tensor = module.o_proj(heads.view(1, 1, -1))
        return output

    def ways(self, hidden: torch.Tensor, angles: Any, rows: Buffers) -> Iterator[None]:
        """As of TokenStep."""
        cos, sin = angles
        fitting = (
            all(
                angle.dtype == hidden.dtype and angle.is_contiguous() and angle.dim() == 3 and angle.shape[:2] == (1, 1)
                for angle in (cos, sin)
            )
            and rows[0].dtype == hidden.dtype
            and rows[0].stride(-1) == rows[1].stride(-1) == 1
        )
        for half in (False, True) if self.half_angles is None else (self.half_angles,):
            if fitting and cos.shape[-1] * (2 if half else 1) <= self.attention.shape.width:
                self.half_angles = half
                yield
