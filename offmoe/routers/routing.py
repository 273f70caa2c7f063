"""Routing of each MoE layer of a loaded model, found by running it once, without knowing its family.

One short forward, with hooks on every module of the decoder layers that have experts, shows which module answered with
the very expert ids that the experts were handed, and what it was given; then which module made that, and so on back to
a state that no module made: the residual stream after attention. This chain is the layer's `Tail`. Where no module
answers with the ids, the MoE block itself is run up to the call of its experts. Each tail is checked before it is
believed: on its own layer's state it must give the ids that the layer used.

Shapes: T tokens, K experts a token, E experts, X what a state has besides (D model width, often the only one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offmoe.hf.call_trace import LayerTrace, LayerTracer, TracedCall, by_name
from offmoe.hf.door import PreTrainedModel
from offmoe.hf.internals import cache_name, experts_modules
from offmoe.hf.seam import LayerBinding, ObserverHook, StateObserver, find_binding
from offmoe.kv.cache import make_kv_cache
from offmoe.routers.agreement import agrees, candidates, decoder_layer_of, with_scores
from offmoe.routers.predictor import Side, Tail, find_tail, ids_given_to_experts, layer_state_name

_NUM_TOKENS = 8
NOT_REACHED = "text does not reach it"
NOT_FOUND = "no module in it answers with the expert ids when called on a state alone"


class RoutingObserver(StateObserver, Protocol):
    """Observer of states while the model runs (see prefetch/lookahead.py). Asleep, it is not told by hooks."""

    is_asleep: bool

    def observe_input(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        """The decoder layer's input, before attention."""


@dataclass(frozen=True, kw_only=True)
class RouterPredictor:
    """Asks one layer's router about a state, without running the layer."""

    tail: Tail
    side: Side

    @torch.no_grad()
    def __call__(self, state_TX: torch.Tensor) -> torch.Tensor | None:
        """(T, *X) state -> (T, K) expert ids on the same device, in the router's order.

        None when the state has another width than this layer's, or the router also looks at something (token ids, the
        previous router's state) that the running forward has not shown. Reads only: calls modules past their hooks.
        """
        return self.tail.expert_ids(state_TX, self.side)

    @torch.no_grad()
    def ranked(self, state_TX: torch.Tensor, factor: int = 2) -> tuple[torch.Tensor, int] | None:
        """(T, *X) -> (T, N) expert ids, best first, `factor` times as many as the router would choose, and how many it
        would. Only the latter where it shows no scores.
        """
        return self.tail.ranked(state_TX, self.side, factor)

    @torch.no_grad()
    def scores(self, state_TX: torch.Tensor) -> torch.Tensor | None:
        """(T, *X) state -> (T, E) by which the router ranks experts; None where it does not show it."""
        return self.tail.scores(state_TX, self.side)


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """One MoE layer. `predictor` is None where the routing was not found; `reason` says why."""

    layer_idx: int
    name: str
    predictor: RouterPredictor | None = None
    reason: str | None = None
    # The layer's module, and its argument that is the state.
    decoder_layer: nn.Module
    input_name: int | str = 0


class InstalledHooks:
    """The hooks of one observer; `remove` leaves the model as it was, and graphs that were compiled with them quiet."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._bindings: list[LayerBinding] = []

    def add(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Call `hook` before `module`."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def observe(self, binding: LayerBinding, observer: StateObserver) -> None:
        """Let graphs tell `observer` of a layer's state."""
        binding.observer = observer
        self._bindings.append(binding)

    def remove(self) -> None:
        """Take all away; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        while self._bindings:
            self._bindings.pop().observer = None


@dataclass(frozen=True, kw_only=True)
class RoutingMap:
    """All MoE layers by number, and `order`: the numbers of those that text reaches, as they run."""

    layers: tuple[LayerRouting, ...]
    order: tuple[int, ...]
    side: Side

    @property
    def predictors(self) -> list[RouterPredictor | None]:
        """One a layer."""
        return [layer.predictor for layer in self.layers]

    def install(self, observer: RoutingObserver) -> InstalledHooks:
        """Tell `observer` what each layer and its router are given, from pre-hooks on the thread that runs the model.

        Under torch.compile the hooks are not part of the graph: a state reaches `observer` through the experts operator
        (hf/seam.py), inputs and what routers look at beside states do not. Install before compiling.
        """
        hooks = InstalledHooks()
        tails = {layer.layer_idx: layer.predictor.tail for layer in self.layers if layer.predictor is not None}
        sides = frozenset[int | str]().union(*(tail.steps[-1].side_names for tail in tails.values()))
        for layer_idx in (layer_idx for layer_idx in self.order if layer_idx in tails):
            tail, binding = tails[layer_idx], find_binding(tails[layer_idx].experts)
            layer = self.layers[layer_idx].decoder_layer
            if sides:
                hooks.add(layer, _note_sides(self.side, sides, observer))
            hooks.add(layer, _InputHook(self.layers[layer_idx], tail, observer))
            hooks.add(tail.steps[0].module, _StateHook(layer_idx, tail, observer, binding))
            if binding is not None:
                hooks.observe(binding, observer)
        return hooks


class _StateHook(ObserverHook):
    """On the first module of a layer's tail: tells of the state from which the router will choose."""

    def __init__(self, layer_idx: int, tail: Tail, observer: RoutingObserver, binding: LayerBinding | None) -> None:
        self._layer_idx, self._observer, self._binding = layer_idx, observer, binding
        self._name, self._rest = tail.steps[0].state_name, tail.steps[0].form.rest

    def tell(self, state: torch.Tensor) -> None:
        if not self._observer.is_asleep:
            self._observer.observe_state(self._layer_idx, state.reshape(-1, *self._rest))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self.tell(_argument(self._name, args, kwargs))
        elif self._binding is not None:
            self._binding.trace_state(_argument(self._name, args, kwargs).reshape(-1, *self._rest))


class _InputHook(ObserverHook):
    """On a decoder layer: tells of its input."""

    def __init__(self, layer: LayerRouting, tail: Tail, observer: RoutingObserver) -> None:
        self._layer_idx, self._name, self._observer = layer.layer_idx, layer.input_name, observer
        self._rest = tail.steps[0].form.rest

    def tell(self, state: torch.Tensor) -> None:
        if not self._observer.is_asleep and state.numel() % torch.Size(self._rest).numel() == 0:
            self._observer.observe_input(self._layer_idx, state.reshape(-1, *self._rest))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self.tell(_argument(self._name, args, kwargs))


def _note_sides(side: Side, names: frozenset[int | str], observer: RoutingObserver) -> Callable[..., None]:
    """A pre-hook of a decoder layer: it remembers what some router will look at beside the state."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_dynamo_compiling() and not observer.is_asleep:
            side.see({key: value for key, value in by_name(args, kwargs).items() if key in names})

    return hook


def _argument(name: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    state = args[name] if isinstance(name, int) else kwargs[name]
    assert isinstance(state, torch.Tensor), f"{name=} {type(state)=}"
    return state


def map_routing(model: PreTrainedModel) -> RoutingMap:
    """Run the model once on a few tokens and find every layer's tail. Meant for before experts are attached."""
    search = _Search(model)
    handles = [layer.register_forward_hook(search.settle) for layer in search.tracers]
    try:
        _run(model)
    finally:
        for tracer in search.tracers.values():
            tracer.remove()
        for handle in handles:
            handle.remove()
    return RoutingMap(layers=tuple(search.layers), order=tuple(search.order), side=search.side)


def _run(model: PreTrainedModel) -> None:
    # With a cache, so that modules that keep a state are seen to be given one, and are not called again.
    ids = torch.arange(1, _NUM_TOKENS + 1, device=model.device) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=True, **{cache_name(model): make_kv_cache(model, _NUM_TOKENS)})


class _Search:
    """Settles each decoder layer when it has run, so that one layer's tensors are kept at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.side = Side()
        self.order: list[int] = []
        self.layers: list[LayerRouting] = []
        self._experts: dict[nn.Module, list[tuple[int, nn.Module]]] = {}
        modules = dict(model.named_modules())
        for layer_idx, (name, module) in enumerate(experts_modules(model)):
            layer = decoder_layer_of(modules, name)
            self.layers.append(LayerRouting(layer_idx=layer_idx, name=name, reason=NOT_REACHED, decoder_layer=layer))
            self._experts.setdefault(layer, []).append((layer_idx, module))
        self.tracers = {
            layer: LayerTracer(layer, [module for _, module in experts], _NUM_TOKENS)
            for layer, experts in self._experts.items()
        }

    def settle(self, decoder_layer: nn.Module, args: object, output: object) -> None:
        """A forward hook: find the tails of the layer that has just run."""
        tracer = self.tracers[decoder_layer]
        trace = tracer.trace
        assert trace is not None, f"{type(decoder_layer).__name__} was not traced"
        with tracer.paused():
            for layer_idx, experts in self._experts[decoder_layer]:
                calls = [call for call in trace.calls if call.module is experts]
                if calls:
                    self.layers[layer_idx] = self._settle(self.layers[layer_idx], trace, calls[0])
                    self.order.append(layer_idx)

    def _settle(self, layer: LayerRouting, trace: LayerTrace, experts_call: TracedCall) -> LayerRouting:
        used_ids = ids_given_to_experts(experts_call.args, experts_call.kwargs).reshape(trace.num_tokens, -1)
        input_name = layer_state_name(trace)
        layer = replace(layer, reason=NOT_FOUND)
        if input_name is None:
            return layer
        layer = replace(layer, input_name=input_name)
        for last, output_idx in candidates(trace, experts_call, used_ids):
            tail = find_tail(trace, last, output_idx, experts_call.module)
            if tail is not None and agrees(tail, trace, used_ids):
                tail = with_scores(tail, trace, used_ids)
                return replace(layer, predictor=RouterPredictor(tail=tail, side=self.side), reason=None)
        return layer
