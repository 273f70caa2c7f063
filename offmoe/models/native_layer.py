"""A decoder layer's one token by one call of the kernels up to its experts, in place of module after module.

A layer is taken where its code is the common one: norm, attention, sum, norm, block, sum, and nothing else. That is
read in its code, and seen by running it at load with parts that only note what they are given. Attention must be of our
own kind (native_attention.py) and have passed its comparison; until then, and for whatever is not one token of our
cache, the layer's own code runs. Each step is rounded as by the modules: the bits are theirs.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offmoe.kernels.cpu.decode import CpuLinear, CpuNorm
from offmoe.kernels.cpu.layer import CpuTokenLayer
from offmoe.models.native import NativeModules, find_norm, make_linear
from offmoe.models.native_attention import AttentionStep
from offmoe.models.native_hooks import Hooks, without_hooks
from offmoe.models.native_moe import MoeStep
from offmoe.models.stand_ins import stand_in

_KIND = "layers"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def swap_layers(native: NativeModules, model: nn.Module) -> None:
    """Swap every decoder layer that is understood. Attention and MoE blocks are swapped already."""
    plain: dict[type[nn.Module], bool] = {}
    for layer in list(model.modules()):
        steps = [step for child in layer.children() if (step := step_of(child, AttentionStep)) is not None]
        if len(steps) != 1 or "forward" in layer.__dict__:
            continue
        if type(layer) not in plain:
            plain[type(layer)] = _is_plain(type(layer))
        if plain[type(layer)]:
            with without_hooks(layer.modules()):
                step = _make_step(native, layer, steps[0])
            if step is not None:
                native.swap(layer, step.forward, _KIND)


def step_of(module: nn.Module, kind: type[Any]) -> Any:
    """The step that `module` runs, where it is of that kind."""
    step = getattr(module.__dict__.get("forward"), "__self__", None)
    return step if isinstance(step, kind) else None


def _is_plain(layer: type[nn.Module]) -> bool:
    """Its forward calls nothing but its own modules, and computes nothing but sums."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(layer.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    operators = [node.op for node in nodes if isinstance(node, (ast.BinOp, ast.AugAssign))]
    return all(_is_own(call) for call in calls) and all(isinstance(operator, ast.Add) for operator in operators)


def _is_own(call: ast.expr) -> bool:
    if isinstance(call, ast.Attribute):
        return isinstance(call.value, ast.Name) and call.value.id == "self"
    return isinstance(call, ast.Name) and call.id == "isinstance"


def _make_step(native: NativeModules, layer: nn.Module, attention: AttentionStep) -> LayerStep | None:
    parts = _Notes(layer, attention).parts()
    if parts is None:
        return None
    norms = [find_norm(native.kernels, part) for part in parts[:2]]
    linears = [make_linear(native.kernels, getattr(attention.module, name)) for name in _PROJECTIONS]
    dtype = attention.attention.shape.dtype
    fitting = all(norm is not None and norm.weight_D.dtype == dtype for norm in norms) and all(
        linear is not None and linear.dtype == dtype and "forward" in getattr(attention.module, name).__dict__
        for linear, name in zip(linears, _PROJECTIONS, strict=True)
    )
    if not fitting:
        return None
    return LayerStep(native, layer, attention, parts, norms, linears)  # type: ignore[arg-type]


class _Notes:
    """Runs a layer's own code with an attention and a block that give random rows and note what they were given."""

    def __init__(self, layer: nn.Module, attention: AttentionStep) -> None:
        self._layer, self._attention = layer, attention.module
        self._called: list[tuple[nn.Module, torch.Tensor]] = []
        dtype = attention.attention.shape.dtype
        width = attention.module.o_proj.out_features
        rows = torch.randn(3, 1, 1, width, generator=torch.Generator().manual_seed(width)).to(dtype)
        self._x, self._attended, self._answer = rows.unbind()
        self._given = {name: object() for name in ("attention_mask", "past_key_values", "position_embeddings")}

    @torch.inference_mode()
    def parts(self) -> tuple[nn.Module, nn.Module, nn.Module] | None:
        """Both norms and the block, where the layer is norm, attention, sum, norm, block, sum."""
        children = list(self._layer.children())
        forward = type(self._layer).forward
        try:
            with stand_in({child: self._noting(child, child.forward) for child in children}):
                output = forward(self._layer, self._x, use_cache=True, position_ids=None, **self._given)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return None
        return self._read(output)

    def _noting(self, child: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            if child is self._attention:
                hidden = kwargs.pop("hidden_states", args[0] if len(args) == 1 else None)
                same = all(kwargs.get(name) is value for name, value in self._given.items())
                self._called.append((child, hidden if same else torch.empty(0)))
                return self._attended, None
            (row,) = args
            if kwargs:
                raise TypeError(f"{sorted(kwargs)} are given to {type(child).__name__}")
            self._called.append((child, row.clone()))
            if len(self._called) in (1, 3):
                return forward(row)
            moe: MoeStep | None = getattr(forward, "__self__", None)
            return moe.answer(self._answer) if isinstance(moe, MoeStep) else self._answer

        return note

    def _read(self, output: object) -> tuple[nn.Module, nn.Module, nn.Module] | None:
        if len(self._called) != 4 or not isinstance(output, torch.Tensor):
            return None
        modules, rows = zip(*self._called, strict=True)
        first, attention, second, block = modules
        if attention is not self._attention or len(set(modules)) != 4:
            return None
        state = self._x + self._attended
        expected = (self._x, first(self._x), state, second(state))
        same = all(
            isinstance(row, torch.Tensor) and torch.equal(row, known) for row, known in zip(rows, expected, strict=True)
        )
        if not same or not torch.equal(output, state + self._answer):
            return None
        return first, second, block


class LayerStep:
    """The `forward` of one decoder layer."""

    def __init__(
        self, native: NativeModules, layer: nn.Module, attention: AttentionStep,
        parts: tuple[nn.Module, nn.Module, nn.Module], norms: tuple[CpuNorm, CpuNorm], linears: list[CpuLinear],
    ) -> None:  # fmt: skip
        """`parts`: the norm before attention, that after it, and the block; `linears`: attention's."""
        self._native, self.layer, self.attention, self.block = native, layer, attention, parts[2]
        self._original = type(layer).forward
        moe: MoeStep | None = step_of(self.block, MoeStep)
        self.moe = moe
        self.kernel = CpuTokenLayer(
            native.kernels, attention.attention, norms, linears, None if moe is None else (moe.router, moe.route)
        )
        self._shape = (1, 1, self.kernel.normed_1D.numel())
        passed, told = [*attention.module.modules(), *parts[:2]], [parts[1]]
        if moe is not None:  # otherwise the block is called, and calls its own
            passed += self.block.modules()
            told = list(dict.fromkeys((parts[1], self.block, moe.gate)))
        self.hooks, self._told = Hooks(passed, told), range(1, len(told))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own, for one token whose cache is ours by the kernels."""
        attention, kernel, moe = self.attention, self.kernel, self.moe
        if attention.has_failed:
            self._native.put_back(self.layer, _KIND)
        rows = None
        if not args and attention.is_settled and self.hooks.may_pass and (moe is None or moe.has_executor):
            rows = attention.cache_layer(hidden_states, kwargs)
        if rows is None or not kernel.takes(hidden_states):
            return self._original(self.layer, hidden_states, *args, **kwargs)
        keys, values = rows.open_row()
        cos, sin = kwargs["position_embeddings"]
        state = kernel(hidden_states, cos, sin, keys, values, half_angles=bool(attention.half_angles))
        self.tell(state)
        if moe is None:
            return state + self.block(kernel.normed_1D.view(self._shape))
        return self.finish(state)

    def tell(self, state: torch.Tensor) -> None:
        """Whoever can be told: of the state after attention, and of what the experts are given."""
        self.hooks.tell(0, state)
        for place in self._told:
            self.hooks.tell(place, self.kernel.normed_1D)

    def finish(self, state: torch.Tensor) -> torch.Tensor:
        """The output of a layer with experts, of the shape of `state`: the kernels have chosen them, with the state."""
        assert self.moe is not None
        return state + self.moe.finish(self.kernel.normed_1D).view(state.shape)
