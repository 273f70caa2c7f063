"""Runs the tail of a layer, from the state after attention to the router's expert ids, on any state.

A tail is a chain of the layer's own modules (norm, mixing of residual streams, router), each called as the layer calls
it; nothing in it knows a family. A layer's router can be asked about another layer's state: that is the lookahead.

Shapes: T tokens, K experts a token, E experts, X whatever else a state has (D model width, often the only one).
"""

from __future__ import annotations

import contextvars
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from offmoe.hf.call_trace import LayerTrace, TracedCall, find_tensor, same_values, tensors_in
from offmoe.hf.seam import ids_that_reach_experts


class Side:
    """Arguments of decoder layers beside their state and some routers look at (token ids, the previous router's
    state): the latest value of each argument. Weak references: a value lives as long as the forward that made it.
    """

    def __init__(self) -> None:
        self._values: dict[int | str, weakref.ref[torch.Tensor]] = {}

    def see(self, arguments: dict[int | str, Any]) -> None:
        """Remember a decoder layer's arguments."""
        self._values = {
            name: weakref.ref(value) for name, value in arguments.items() if isinstance(value, torch.Tensor)
        }

    def value(self, name: int | str) -> torch.Tensor | None:
        """The argument's latest value; None when there is none, or its forward is over."""
        reference = self._values.get(name)
        return None if reference is None else reference()


@dataclass(frozen=True, slots=True)
class Form:
    """Layout of a per-token tensor: (1, T, *rest) or (T, *rest)."""

    batched: bool
    rest: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor, num_tokens: int) -> Form | None:
        """None when no leading dimension counts tokens."""
        if tensor.shape[:2] == (1, num_tokens):
            return Form(True, tuple(tensor.shape[2:]), tensor.dtype)
        if tensor.shape[:1] == (num_tokens,):
            return Form(False, tuple(tensor.shape[1:]), tensor.dtype)
        return None

    def apply(self, tensor: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """`tensor` in this form."""
        lead = (1, num_tokens) if self.batched else (num_tokens,)
        return tensor.reshape(*lead, *self.rest).to(self.dtype)

    def fits(self, tensor: torch.Tensor, num_tokens: int) -> bool:
        """The numbers a token are as many as they were."""
        return tensor.numel() == num_tokens * torch.Size(self.rest).numel()


@dataclass(frozen=True, slots=True)
class _State:
    """Here the module is given the state."""


@dataclass(frozen=True, slots=True)
class _Constant:
    value: object


@dataclass(frozen=True, slots=True)
class _Resident:
    module: nn.Module
    name: str


@dataclass(frozen=True, slots=True)
class _FromLayer:
    """An argument of the decoder layer, one value a token."""

    name: int | str
    form: Form


_Argument = _State | _Constant | _Resident | _FromLayer


@dataclass(frozen=True, slots=True)
class TailStep:
    """One module of the tail, and how the layer calls it."""

    module: nn.Module
    args: tuple[_Argument, ...]
    kwargs: dict[str, _Argument]
    form: Form
    state_name: int | str
    # Which tensor of its answer goes on to the next step. None: the answer is not used (see `Tail.experts`).
    output_idx: int | None

    @property
    def side_names(self) -> frozenset[int | str]:
        """Arguments of the decoder layer, besides its state, that the module is given."""
        given = (*self.args, *self.kwargs.values())
        return frozenset(argument.name for argument in given if isinstance(argument, _FromLayer))

    def run(self, state: torch.Tensor, side: Side) -> Any | None:
        """The module's answer, past all hooks; None when something that it needs is not there."""
        num_tokens = state.shape[0]
        if not self.form.fits(state, num_tokens):
            return None
        args = [self._value(argument, state, side) for argument in self.args]
        kwargs = {name: self._value(argument, state, side) for name, argument in self.kwargs.items()}
        if any(value is _MISSING for value in (*args, *kwargs.values())):
            return None
        return self.module.forward(*args, **kwargs)

    def _value(self, argument: _Argument, state: torch.Tensor, side: Side) -> object:
        match argument:
            case _State():
                return self.form.apply(state, state.shape[0])
            case _Constant(value):
                return value
            case _Resident(module, name):
                return getattr(module, name)
            case _FromLayer(name, form):
                given = side.value(name)
                if given is None or not form.fits(given, state.shape[0]):
                    return _MISSING
                return form.apply(given, state.shape[0])


_MISSING = object()


def ids_given_to_experts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The expert ids among an experts module's arguments (transformers names them `top_k_index`)."""
    ids = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
    assert isinstance(ids, torch.Tensor), f"{type(ids)=}"
    return ids


@dataclass(frozen=True, slots=True)
class Tail:
    """The chain of a layer. Its last step answers with the ids, or hands them to `experts`, which are bound (seam.py)
    then.
    """

    steps: tuple[TailStep, ...]
    experts: nn.Module
    scores_idx: int | None = None

    def expert_ids(self, state: torch.Tensor, side: Side) -> torch.Tensor | None:
        """(T, *X) -> (T, K); None when the state has another form, or a side value is not there."""
        last = self.steps[-1]
        if last.output_idx is None:
            ids = ids_that_reach_experts(partial(self._run, state, side))
            return None if ids is None else ids.reshape(state.shape[0], -1)
        answer = self.answer(state, side)
        return None if answer is None else list(tensors_in(answer))[last.output_idx].reshape(state.shape[0], -1)

    def scores(self, state: torch.Tensor, side: Side) -> torch.Tensor | None:
        """(T, *X) -> (T, E), by which the router ranks; None where it shows no such thing."""
        if self.scores_idx is None:
            return None
        answer = self.answer(state, side)
        return None if answer is None else list(tensors_in(answer))[self.scores_idx].reshape(state.shape[0], -1)

    def ranked(self, state: torch.Tensor, side: Side, factor: int) -> tuple[torch.Tensor, int] | None:
        """(T, *X) -> (T, N), the best experts first, and how many of them, K, the router would choose.

        N is `factor` * K at most, and K where the router shows no scores. None as `expert_ids`.
        """
        last = self.steps[-1]
        if last.output_idx is None or self.scores_idx is None:
            ids = self.expert_ids(state, side)
            return None if ids is None else (ids, ids.shape[1])
        answer = self.answer(state, side)
        if answer is None:
            return None
        tensors = list(tensors_in(answer))
        top_k = tensors[last.output_idx].reshape(state.shape[0], -1).shape[1]
        scores_TE = tensors[self.scores_idx].reshape(state.shape[0], -1)
        return scores_TE.topk(min(factor * top_k, scores_TE.shape[1])).indices, top_k

    def answer(self, state: torch.Tensor, side: Side) -> Any | None:
        """Answer of the last step's module; None as `expert_ids`."""
        # An empty context, as in seam.py.
        return contextvars.Context().run(self._run, state, side)

    def _run(self, state: torch.Tensor, side: Side) -> Any | None:
        num_tokens = state.shape[0]
        for step in self.steps[:-1]:
            answer = step.run(state, side)
            if answer is None or step.output_idx is None:
                return None
            state = list(tensors_in(answer))[step.output_idx].reshape(num_tokens, -1)
        return self.steps[-1].run(state, side)


def find_tail(trace: LayerTrace, last: TracedCall, output_idx: int | None, experts: nn.Module) -> Tail | None:
    """The chain that ends with the call `last`, as far back as it is understood; None when even `last` is not.

    Only `last` may look at the layer's other arguments: for the steps before it these are states of the layers passed,
    which another layer does not have yet.
    """
    step = _understand(trace, last, output_idx)
    if step is None or trace.count(last.module) > 1:
        return None
    steps, call = [step], last
    while True:
        state = call.arguments()[steps[0].state_name]
        before = [
            (producer, found)
            for producer in trace.producers(state, call)
            if trace.count(producer.module) == 1
            and (found := _understand(trace, producer, find_tensor(producer.output, state))) is not None
            and not found.side_names
        ]
        if not before:
            return Tail(tuple(steps), experts)
        call, step = before[0]
        steps.insert(0, step)


def _understand(trace: LayerTrace, call: TracedCall, output_idx: int | None) -> TailStep | None:
    """Recipe to call the module again with another state; None when it is given something that only this moment has."""
    layer_arguments = trace.layer.arguments()
    layer_state = layer_state_name(trace)
    arguments: dict[int | str, _Argument] = {}
    state_name, state_form = None, None
    for name, value in call.arguments().items():
        argument = _recognise(trace, value, layer_arguments, layer_state)
        if argument is None:
            form = Form.of(value, trace.num_tokens) if isinstance(value, torch.Tensor) else None
            if form is None or state_name is not None or not value.is_floating_point():
                return None
            state_name, state_form, argument = name, form, _State()
        arguments[name] = argument
    if state_name is None or state_form is None:
        return None
    args = tuple(argument for name, argument in arguments.items() if isinstance(name, int))
    kwargs = {name: argument for name, argument in arguments.items() if isinstance(name, str)}
    return TailStep(call.module, args, kwargs, state_form, state_name, output_idx)


def _recognise(
    trace: LayerTrace, value: Any, layer_arguments: dict[int | str, Any], layer_state: int | str | None
) -> _Argument | None:
    if value is None or isinstance(value, (bool, int, float, str)):
        return _Constant(value)
    if not isinstance(value, torch.Tensor):
        return None
    if id(value) in trace.residents:
        return _Resident(*trace.residents[id(value)])
    for name, given in layer_arguments.items():
        if name != layer_state and isinstance(given, torch.Tensor) and same_values(given, value):
            form = Form.of(value, trace.num_tokens)
            return None if form is None else _FromLayer(name, form)
    return None


def layer_state_name(trace: LayerTrace) -> int | str | None:
    """The decoder layer's argument that is the state: its first per-token tensor of floating point."""
    for name, value in trace.layer.arguments().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and Form.of(value, trace.num_tokens):
            return name
    return None
