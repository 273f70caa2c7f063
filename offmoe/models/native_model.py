"""A decoder's one token: embedding, rotary angles, layers in as few calls as can be, last norm.

transformers' own code for it makes a mask that hides nothing, copies the list of layers and calls each with a dozen
arguments: half a millisecond a token on two slow cores. A decoder is taken where its code calls nothing but its own
modules and what makes masks, and where in two tokens that it computed itself, its modules were called as they would be
here. Whatever is no plain step of one token with our cache is computed by its own code.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from offmoe.models.angles import AngleTable
from offmoe.models.kv_cache import PreallocatedLayer, SlidingLayer
from offmoe.models.native import NativeModules
from offmoe.models.native_layer import LayerStep, step_of
from offmoe.models.native_run import LayerRun, find_runs
from offmoe.models.native_token import mask_sees_all
from offmoe.models.stand_ins import stand_in

_KIND = "decoders"
# Tokens that the decoder computes itself while it is looked at.
_NUM_CHECKS = 2
_KNOWN_CALLS = {
    "DynamicCache", "arange", "create_causal_mask", "create_sliding_window_causal_mask", "enumerate", "get_seq_length",
    "isinstance", "mask_function", "set", "unsqueeze", "ValueError",
}  # fmt: skip
_FLAGS = ("output_attentions", "output_hidden_states", "output_router_logits")
_ARGUMENTS = {
    "input_ids", "position_ids", "past_key_values", "use_cache", "attention_mask", "inputs_embeds", "return_dict",
    *_FLAGS,
}  # fmt: skip


def swap_decoders(native: NativeModules, model: nn.Module) -> None:
    """Swap every decoder that is understood, with layers that are computed whole."""
    for module in list(model.modules()):
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        if len(lists) != 1 or "forward" in vars(module) or not hasattr(module, "config"):
            continue
        layers = list(lists[0])
        if any(step_of(layer, LayerStep) is not None for layer in layers) and _is_plain(type(module)):
            native.swap(module, DecoderStep(native, module, layers).forward, _KIND)


def _is_plain(decoder: type[nn.Module]) -> bool:
    """Its forward calls only what is known, and computes nothing but positions."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(decoder.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    loops = [node.target for node in nodes if isinstance(node, ast.For)]
    known = _KNOWN_CALLS | {name.id for loop in loops for name in ast.walk(loop) if isinstance(name, ast.Name)}
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    operators = [node.op for node in nodes if isinstance(node, (ast.BinOp, ast.AugAssign))]
    return all(_is_known(call, known) for call in called) and all(
        isinstance(operator, (ast.Add, ast.BitXor)) for operator in operators
    )


def _is_known(call: ast.expr, known: set[str]) -> bool:
    if isinstance(call, ast.Attribute):
        is_own = isinstance(call.value, ast.Name) and call.value.id == "self"
        return is_own or call.attr in known
    if isinstance(call, ast.Subscript):  # a table of what makes masks, written there
        return isinstance(call.value, ast.Name)
    return isinstance(call, ast.Name) and (call.id in known or call.id.endswith("ModelOutputWithPast"))


class DecoderStep:
    """The `forward` of one decoder."""

    def __init__(self, native: NativeModules, module: Any, layers: Sequence[nn.Module]) -> None:
        self._native, self.module, self._layers = native, module, list(layers)
        self._original = type(module).forward
        self._slides = bool(getattr(module.config, "sliding_window", None))
        self._kinds = getattr(module.config, "layer_types", None) if "layer_types" in _source(type(module)) else None
        self._checks_left = _NUM_CHECKS
        self._way: _Way | None = None
        self._parts: list[LayerRun | nn.Module] = []
        self._version = -1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the decoder's own; for one token of our cache by the kernels, where that was seen to be the same."""
        if args or not self._takes(kwargs):
            return self._original(self.module, *args, **kwargs)
        if self._checks_left:
            return self._check(kwargs)
        way = self._way
        assert way is not None
        x = way.embed(kwargs["input_ids"])
        given = way.layer_arguments(x, kwargs)
        parts = self._current_parts()
        if way.has_masks and (len(parts) > 1 or not isinstance(parts[0], LayerRun)):
            return self._original(self.module, **kwargs)
        for part in parts:
            y = part.forward(x, given) if isinstance(part, LayerRun) else part(x, **given)
            if y is None and way.has_masks:
                return self._original(self.module, **kwargs)
            x = _one_by_one(part, x, given) if y is None else y
        return way.output(last_hidden_state=way.norm(x), past_key_values=kwargs["past_key_values"])

    def _current_parts(self) -> list[LayerRun | nn.Module]:
        if self._version != self._native.version:
            self._parts, self._version = find_runs(self._native, self._layers), self._native.version
        return self._parts

    def _takes(self, kwargs: dict[str, Any]) -> bool:
        """A plain step of one token."""
        ids, past, config = kwargs.get("input_ids"), kwargs.get("past_key_values"), self.module.config
        if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling() or not kwargs.keys() <= _ARGUMENTS:
            return False
        if ids is None or ids.shape != (1, 1) or past is None or kwargs.get("position_ids") is None:
            return False
        if kwargs.get("attention_mask") is not None or kwargs.get("inputs_embeds") is not None:
            return False
        if not kwargs.get("use_cache") or kwargs.get("return_dict") is False or not config.return_dict:
            return False
        if any(kwargs.get(flag) or getattr(config, flag, False) for flag in _FLAGS):
            return False
        return self._sees_all(past)

    def _sees_all(self, past: Any) -> bool:
        """The one token sees every row of every layer: a window's cache has no others, all tokens' has all of them."""
        layers = past.layers
        if len(layers) != len(self._layers):
            return False
        for idx, layer in enumerate(layers):
            if isinstance(layer, SlidingLayer):
                continue
            if not isinstance(layer, PreallocatedLayer):
                return False
            if self._slides and (self._kinds is None or self._kinds[idx] != "full_attention"):
                return False
        return True

    def _check(self, kwargs: dict[str, Any]) -> Any:
        """The decoder's own code, looked at; where its modules are called in another way, it stays."""
        children = [child for child in self.module.children() if not isinstance(child, nn.ModuleList)]
        calls = _Calls()
        with stand_in({module: calls.noting(module) for module in (*children, *self._layers)}) as are_noted:
            with_notes = self._original(self.module, **kwargs)
        if not are_noted:
            return with_notes
        self._way = calls.read(self._layers, kwargs, with_notes, slides=self._slides)
        self._checks_left -= 1
        if self._way is None:
            self._native.put_back(self.module, _KIND)
        return with_notes


def _one_by_one(run: Any, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    for layer in run.layers:
        x = layer(x, **given)
    return x


def _source(decoder: type[nn.Module]) -> str:
    try:
        return inspect.getsource(decoder.forward)
    except (OSError, TypeError):
        return ""


class _Way:
    """How a decoder calls its modules. `has_masks`: its masks hide nothing, but there are some; torch's attention may
    round otherwise without, so only the kernels may do without them.
    """

    def __init__(
        self, embed: nn.Module, rotary: nn.Module, norm: nn.Module, output: type[ModelOutput], *,
        positions_by_name: bool, has_masks: bool, flags: dict[str, Any],
    ) -> None:  # fmt: skip
        self.embed, self.norm, self.output = embed, norm, output
        self._angles, self.has_masks, self._flags = AngleTable(rotary, by_name=positions_by_name), has_masks, flags

    def layer_arguments(self, x: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What every layer is given beside its input."""
        positions = kwargs["position_ids"]
        return {
            **self._flags, "attention_mask": None, "position_ids": positions, "use_cache": True,
            "past_key_values": kwargs["past_key_values"], "position_embeddings": self._angles(x, positions),
        }  # fmt: skip


class _Calls:
    """Calls of modules, with what each was given and what it answered."""

    def __init__(self) -> None:
        self._calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []

    def noting(self, module: nn.Module) -> Callable[..., Any]:
        """The module's forward, but it notes its calls."""
        forward = module.forward

        def note(*args: Any, **kwargs: Any) -> Any:
            answer = forward(*args, **kwargs)
            self._calls.append((module, args, kwargs, answer))
            return answer

        return note

    def read(self, layers: Sequence[nn.Module], given: dict[str, Any], output: Any, *, slides: bool) -> _Way | None:
        """None where they were called in another way than here. `slides`: masks may come with more tokens."""
        if len(self._calls) != len(layers) + 3 or not isinstance(output, ModelOutput):
            return None
        (embed, *embedded), (rotary, *turned), *called, (norm, *normed) = self._calls
        x, angles, positions = embedded[-1], turned[-1], given["position_ids"]
        by_name = set(turned[1]) == {"position_ids"}
        asked = (*turned[0], *turned[1].values())
        if len(embedded[0]) != 1 or embedded[0][0] is not given["input_ids"] or embedded[1]:
            return None
        if (
            len(asked) != 2
            or len(turned[0]) != 2 - by_name
            or asked[0] is not x
            or asked[1] is not positions
            or not isinstance(angles, tuple)
            or len(angles) != 2
        ):
            return None
        expected = {
            "position_ids": positions, "use_cache": True, "past_key_values": given["past_key_values"],
            "position_embeddings": angles,
        }  # fmt: skip
        flags: dict[str, Any] = {}
        masks = []
        for layer, (module, args, kwargs, answer) in zip(layers, called, strict=True):
            masks.append(kwargs.get("attention_mask"))
            flags = {name: value for name, value in kwargs.items() if name not in (*expected, "attention_mask")}
            same = all(kwargs.get(name) is value for name, value in expected.items()) and not any(flags.values())
            if module is not layer or len(args) != 1 or args[0] is not x or not same or not mask_sees_all(masks[-1]):
                return None
            x = answer
        fields = {"last_hidden_state": normed[-1], "past_key_values": given["past_key_values"]}
        same = output.keys() == fields.keys() and all(output[name] is value for name, value in fields.items())
        if not same or len(normed[0]) != 1 or normed[0][0] is not x or normed[1]:
            return None
        has_masks = slides or any(mask is not None for mask in masks)
        return _Way(embed, rotary, norm, type(output), positions_by_name=by_name, has_masks=has_masks, flags=flags)
