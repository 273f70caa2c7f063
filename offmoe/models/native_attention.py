"""Attention of one token by the CPU kernels, in place of some forty operations of torch.

A module is taken where its own code does nothing but project, norm, rotate, append to the cache, attend and project:
its `forward` is read, and one that calls anything else, or computes, is left alone. So what depends on the position,
the configuration or an argument cannot be overlooked. What the code does not say (which rotation, which scale) is seen
by comparing: the first tokens are computed both ways, and where the results differ the module keeps its own code.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from offmoe.kernels.cpu.decode import AttentionShape, CpuAttention, CpuNorm
from offmoe.models.kv_cache import PreallocatedLayer, SlidingLayer
from offmoe.models.native import NativeModules, agree, find_norm

_KIND = "attentions"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_KNOWN_CALLS = {
    *_PROJECTIONS, "q_norm", "k_norm", "view", "transpose", "reshape", "contiguous", "update", "get_interface",
    "attention_interface", "apply_rotary_pos_emb", "getattr",
}  # fmt: skip
# Tokens that are computed both ways.
_NUM_CHECKS = 2


def swap_attention(native: NativeModules, model: nn.Module) -> None:
    """Swap the attention of every layer that is understood."""
    plain: dict[tuple[type[nn.Module], int], bool] = {}
    masks = _Masks()
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
                native.swap(module, step, _KIND)


def _is_plain(attention: type[nn.Module], config: object = None) -> bool:
    """Its forward calls only what is known, and computes nothing by itself. What it does only where a number of
    `config` is set that is not (OLMoE: clips queries and keys) does not count.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(attention.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    statements = [statement for statement in function.body if not _is_passed_by(statement, config)]
    nodes = [node for statement in statements for node in ast.walk(statement)]
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "?")
        for node in nodes
        if isinstance(node, ast.Call)
    }
    computes = any(isinstance(node, (ast.BinOp, ast.AugAssign)) for node in nodes)
    return "apply_rotary_pos_emb" in called and called <= _KNOWN_CALLS and not computes


def _is_passed_by(statement: ast.stmt, config: object) -> bool:
    """`if self.config.number is not None: ...`, and it is None."""
    if not isinstance(statement, ast.If) or statement.orelse:
        return False
    start, end = "self.config.", " is not None"
    name = ast.unparse(statement.test).removeprefix(start).removesuffix(end)
    same = ast.unparse(statement.test) == f"{start}{name}{end}"
    return same and name.isidentifier() and getattr(config, name, ...) is None


def _make_step(native: NativeModules, module: Any, masks: _Masks) -> Callable[..., Any] | None:
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


class _Masks:
    """All layers of a kind are given the same mask: it is looked at once a token."""

    def __init__(self) -> None:
        self._last: object = None
        self._sees_all = True

    def sees_all(self, mask: Any) -> bool:
        """The one token sees every row that the cache gives it."""
        if mask is not self._last:
            self._last, self._sees_all = mask, mask_sees_all(mask)
        return self._sees_all


class AttentionStep:
    """The `forward` of one attention module. `half_angles` is None until a token was computed both ways."""

    def __init__(self, native: NativeModules, module: Any, attention: CpuAttention, masks: _Masks) -> None:
        self._native, self.module, self.attention, self._masks = native, module, attention, masks
        self._original = type(module).forward
        self._checks_left = _NUM_CHECKS
        self.half_angles: bool | None = None
        self.has_failed = False

    @property
    def is_settled(self) -> bool:
        """It was compared, and agreed."""
        return not self._checks_left and not self.has_failed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own; (output, None) for one token whose cache is ours."""
        hidden: Any = kwargs.get("hidden_states", args[0] if args else None)
        layer = None if len(args) > 1 else self.cache_layer(hidden, kwargs)
        if layer is None:
            return self._original(self.module, *args, **kwargs)
        if self._checks_left:
            return self._check(hidden, layer, args, kwargs)
        keys, values = layer.open_row()
        return self._run(hidden, kwargs["position_embeddings"], keys, values), None

    def cache_layer(self, hidden: Any, kwargs: dict[str, Any]) -> Any:
        """Where the token's keys and values go; None where this is no step for the kernels."""
        past = kwargs.get("past_key_values")
        if past is None or not self.sees_all(hidden, kwargs):
            return None
        return self.own_layer(past)

    def sees_all(self, hidden: Any, kwargs: dict[str, Any]) -> bool:
        """It is one token, and of the rows that the cache gives it, it sees all."""
        if torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled():
            return False
        if not isinstance(hidden, torch.Tensor) or hidden.shape[:-1] != (1, 1):
            return False
        if kwargs.get("position_embeddings") is None or kwargs.get("output_attentions"):
            return False
        return self._masks.sees_all(kwargs.get("attention_mask"))

    def own_layer(self, past: Any) -> Any:
        """Its layer of the cache, if that is ours and has room for one token more; else None."""
        layers, layer_idx = past.layers, self.module.layer_idx
        layer = layers[layer_idx] if layer_idx < len(layers) else None
        return layer if isinstance(layer, (PreallocatedLayer, SlidingLayer)) and layer.can_open else None

    def _run(self, hidden: torch.Tensor, angles: Any, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        module, (cos, sin) = self.module, angles
        query, key, value = module.q_proj(hidden), module.k_proj(hidden), module.v_proj(hidden)
        heads = self.attention(query, key, value, cos, sin, keys[0], values[0], half_angles=bool(self.half_angles))
        output: torch.Tensor = module.o_proj(heads.view(1, 1, -1))
        return output

    def _check(self, hidden: torch.Tensor, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Both ways: ours if it agrees, as for all tokens after this one, or the same text would not come out the next
        time. If not, the module's own, and its own code from now on.
        """
        theirs = self._original(self.module, *args, **kwargs)
        cos, sin = kwargs["position_embeddings"]
        rows = layer.last_rows()
        before = [states[..., -1, :].clone() for states in rows]
        fitting = (
            all(
                angle.dtype == hidden.dtype and angle.is_contiguous() and angle.dim() == 3 and angle.shape[:2] == (1, 1)
                for angle in (cos, sin)
            )
            and rows[0].dtype == hidden.dtype
            and rows[0].stride(-1) == rows[1].stride(-1) == 1
        )
        self._checks_left -= 1
        for half in (False, True) if self.half_angles is None else (self.half_angles,):
            if not fitting or cos.shape[-1] * (2 if half else 1) > self.attention.shape.width:
                continue
            self.half_angles = half
            ours = self._run(hidden, (cos, sin), *rows)
            if agree(ours, theirs[0]):
                return ours, None
        for states, own in zip(rows, before, strict=True):
            states[..., -1, :] = own
        self.has_failed = True
        self._native.put_back(self.module, _KIND)
        return theirs


def mask_sees_all(mask: Any) -> bool:
    """The one token sees every row that the cache gives it. Masks are of one sequence: a row is one number."""
    if mask is None:
        return True
    if not isinstance(mask, torch.Tensor) or mask.shape[:-1] != (1, 1, 1):
        return False
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())
