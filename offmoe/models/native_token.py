"""What attention modules that the CPU kernels compute for one token have in common: whose, when, and the comparison."""

from __future__ import annotations

import ast
import inspect
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from offmoe.models.kv_cache import Buffers, PreallocatedLayer, SlidingLayer
from offmoe.models.native import NativeModules, agree

ATTENTIONS = "attentions"
# Tokens that are computed both ways.
_NUM_CHECKS = 2


class Masks:
    """All layers of a kind are given the same mask: it is looked at once a token."""

    def __init__(self) -> None:
        self._last: object = None
        self._sees_all = True

    def sees_all(self, mask: Any) -> bool:
        """The one token sees every row that the cache gives it."""
        if mask is not self._last:
            self._last, self._sees_all = mask, mask_sees_all(mask)
        return self._sees_all


def calls_only(
    attention: type[nn.Module], known: set[str], rotates: set[str],
    is_passed_by: Callable[[ast.stmt], bool] = lambda statement: False,
) -> bool:  # fmt: skip
    """Its forward calls only what is `known`, one of `rotates` too, and computes nothing by itself. Statements that are
    passed by do not count.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(attention.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    statements = [statement for statement in function.body if not is_passed_by(statement)]
    nodes = [node for statement in statements for node in ast.walk(statement)]
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "?")
        for node in nodes
        if isinstance(node, ast.Call)
    }
    computes = any(isinstance(node, (ast.BinOp, ast.AugAssign)) for node in nodes)
    return bool(called & rotates) and called <= known | rotates and not computes


class TokenStep(ABC):
    """The `forward` of one attention module."""

    def __init__(self, native: NativeModules, module: Any, masks: Masks) -> None:
        self._native, self.module, self._masks = native, module, masks
        self._original = type(module).forward
        self._checks_left = _NUM_CHECKS
        self.has_failed = False

    @abstractmethod
    def run(self, hidden: torch.Tensor, angles: Any, rows: Buffers) -> torch.Tensor:
        """The output for one token, by the kernels. `rows`: all of its cache that it sees, the last is written."""

    @abstractmethod
    def ways(self, hidden: torch.Tensor, angles: Any, rows: Buffers) -> Iterator[None]:
        """Until one is found to agree: what `run` may be, each set while it is the current one. Nothing where the
        kernels cannot compute it at all.
        """

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
        return self.run(hidden, kwargs["position_embeddings"], layer.open_row()), None

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

    def _check(self, hidden: torch.Tensor, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Both ways: ours if it agrees, as for all tokens after this one, or the same text would not come out the next
        time. If not, the module's own, and its own code from now on.
        """
        theirs = self._original(self.module, *args, **kwargs)
        angles, rows = kwargs["position_embeddings"], layer.last_rows()
        before = [states[..., -1, :].clone() for states in rows]
        self._checks_left -= 1
        for _ in self.ways(hidden, angles, rows):
            ours = self.run(hidden, angles, rows)
            if agree(ours, theirs[0]):
                return ours, None
        for states, own in zip(rows, before, strict=True):
            states[..., -1, :] = own
        self.has_failed = True
        self._native.put_back(self.module, ATTENTIONS)
        return theirs


def mask_sees_all(mask: Any) -> bool:
    """The one token sees every row that the cache gives it. Masks are of one sequence: a row is one number."""
    if mask is None:
        return True
    if not isinstance(mask, torch.Tensor) or mask.shape[:-1] != (1, 1, 1):
        return False
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())
