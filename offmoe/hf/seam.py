"""The seam where transformers' model code hands an experts call to offmoe.

Registration is process-wide, so the registered function knows nothing: all state is on the module, in a binding that
the loader puts there. Several engines in one process therefore do not meet. Under torch.compile the call becomes an
operator of its own, which a graph keeps as it is and which finds the binding by its number. A graph runs no hooks:
the state that a hook would show to an observer goes into the operator as one more tensor.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import library as operators
from torch import nn

from offmoe.core.errors import EngineClosedError, UsageError
from offmoe.hf.internals import register_experts_function
from offmoe.kernels.reference import ExpertMath

_BINDING_NAME, _HANDLE_NAME, _RESIDENT_NAME = "_offmoe_binding", "_offmoe_handle", "_offmoe_is_resident"


class ExpertsExecutor(Protocol):
    """Computer of a layer's experts."""

    def run_layer(
        self, layer_idx: int, math: ExpertMath, num_experts: int,
        x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The experts' weighted sum, (T, D)."""


class StateObserver(Protocol):
    """Observer of the states that a layer's router chooses from."""

    def observe_state(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        """The state after attention, from which this layer's router will choose. Not to be kept longer than the call
        of `run_layer` that follows: in compiled steps on CUDA its memory is a graph's.
        """


class ObserverHook(ABC):
    """A pre-hook that does nothing but to tell somebody of its module's input."""

    @abstractmethod
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The module is about to be called."""

    @abstractmethod
    def tell(self, state: torch.Tensor) -> None:
        """The same for this input, where the module is not called."""


# The one table that operators in compiled graphs can see. It keeps no binding alive: modules do.
_binding_of_handle: WeakValueDictionary[int, LayerBinding] = WeakValueDictionary()
_numbering = threading.Lock()


@dataclass(eq=False)
class LayerBinding:
    """State of a served experts module: its number, its arithmetic, and who runs it (None: not yet).

    `halves`: see MoeLayer. `observer`: see routers/routing.py.
    `handle` names the binding within this process, as a constant of graphs. It is the smallest number that is free, so
    that an engine's graphs are those of the one before it and torch's cache of compiled code knows them. A graph is
    called by its model, which keeps the binding: no graph lives to meet another's.
    """

    layer_idx: int
    num_experts: int
    dtype: torch.dtype
    halves: bool = False
    math: ExpertMath | None = None
    executor: ExpertsExecutor | None = None
    observer: StateObserver | None = None
    # On its way from a hook to the experts call of the same trace. Set and deleted there, never set at any other time:
    # so torch finds nothing to be done after the graph.
    _traced_state_TX: torch.Tensor = field(init=False, repr=False)
    handle: int = field(init=False)

    def __post_init__(self) -> None:
        with _numbering:
            self.handle = next(number for number in itertools.count() if number not in _binding_of_handle)
            _binding_of_handle[self.handle] = self

    def trace_state(self, state_TX: torch.Tensor) -> None:
        """While a graph is traced: the layer's experts call, which follows, takes this along for the observer."""
        self._traced_state_TX = state_TX

    def take_traced_state(self) -> torch.Tensor | None:
        """While a graph is traced: what `trace_state` was given; it is forgotten."""
        if not hasattr(self, "_traced_state_TX"):
            return None
        state_TX = self._traced_state_TX
        del self._traced_state_TX
        return state_TX


_wants_ids: ContextVar[bool] = ContextVar("wants_ids", default=False)


class _IdsKnownError(Exception):
    """Leaves a block's forward where it hands its expert ids over."""

    def __init__(self, ids_TK: torch.Tensor) -> None:
        super().__init__()
        self.ids_TK = ids_TK


def ids_that_reach_experts(run: Callable[[], object]) -> torch.Tensor | None:
    """Call `run` until it hands expert ids to bound experts: these, (T, K), and nothing is computed. None: it does not.

    In an empty context: modules called inside must not show in outputs that transformers collects through it.
    """
    context = Context()
    context.run(_wants_ids.set, True)
    try:
        context.run(run)
    except _IdsKnownError as known:
        return known.ids_TK
    return None


class ClosedExecutor:
    """Executor of a closed engine, so that a model used later says so instead of answering without experts."""

    def run_layer(
        self, layer_idx: int, math: ExpertMath, num_experts: int,
        x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Raises EngineClosedError."""
        raise EngineClosedError("the engine is closed; load the model again")


def bind(module: torch.nn.Module, binding: LayerBinding) -> None:
    """Serve this module's experts through `binding`: zeros until an executor is attached."""
    register_experts_function(serve_experts)
    setattr(module, _BINDING_NAME, binding)
    setattr(module, _HANDLE_NAME, binding.handle)
    setattr(module, _RESIDENT_NAME, False)


def attach(module: torch.nn.Module, executor: ExpertsExecutor) -> None:
    """Let `executor` compute a bound module's experts. The module's resident parts are loaded by now."""
    binding = _binding_of(module)
    binding.math = math_of(module)
    binding.executor = executor
    needs_no_host = getattr(executor, "needs_no_host", None)
    setattr(module, _RESIDENT_NAME, needs_no_host is not None and needs_no_host(binding.layer_idx))


def find_binding(module: torch.nn.Module) -> LayerBinding | None:
    """A module's binding; None when it is not bound."""
    return getattr(module, _BINDING_NAME, None)


def _binding_of(module: torch.nn.Module) -> LayerBinding:
    binding = getattr(module, _BINDING_NAME)
    assert isinstance(binding, LayerBinding), f"{type(module).__name__} is not bound"
    return binding


def math_of(module: torch.nn.Module) -> ExpertMath:
    """The module's own arithmetic, as the decorator's attributes and its resident parts describe it."""
    experts: Any = module
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    activate = experts._apply_gate if experts.has_gate else experts.act_fn
    up_bias_EF = getattr(experts, up_name + "_bias") if experts.has_bias else None
    if _binding_of(module).halves:
        activate = _after_taking_turns(activate)
        up_bias_EF = None if up_bias_EF is None else torch.cat([up_bias_EF[:, ::2], up_bias_EF[:, 1::2]], dim=1)
    return ExpertMath(
        activate=activate,
        up_bias_EF=up_bias_EF,
        down_bias_ED=experts.down_proj_bias if experts.has_bias else None,
        # transformers 5.17 has no such attribute, and no experts with a norm of their own.
        post_norm=experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None,
        transposed=bool(experts.is_transposed),
        dtype=_binding_of(module).dtype,
    )


def _after_taking_turns(activate: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`activate` for gate and up in halves, where it wants [gate 0, up 0, gate 1, up 1, ...]."""
    return lambda up_NF: activate(torch.stack(up_NF.chunk(2, dim=-1), dim=-1).flatten(-2))


def serve_experts(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The registered experts function: (T, D) states, (T, K) expert ids and weights -> (T, D).

    Before the executor is attached (while the loader measures the KV cache) the experts contribute zero.
    """
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids_TK = top_k_index.reshape(x_TD.shape[0], -1)
    weights_TK = top_k_weights.reshape(ids_TK.shape)
    if torch.compiler.is_dynamo_compiling():
        state_TX = getattr(module, _BINDING_NAME).take_traced_state()
        handle = getattr(module, _HANDLE_NAME)
        if getattr(module, _RESIDENT_NAME):
            y_TD: torch.Tensor = torch.ops.offmoe.resident_experts(x_TD, ids_TK, weights_TK, handle)
        else:
            y_TD = torch.ops.offmoe.experts(x_TD, ids_TK, weights_TK, handle, state_TX)
    elif _wants_ids.get():
        raise _IdsKnownError(ids_TK)
    else:
        y_TD = _run(_binding_of(module), x_TD, ids_TK, weights_TK)
    return y_TD.view(hidden_states.shape)


def _run(binding: LayerBinding, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    if binding.executor is None or binding.math is None:
        return torch.zeros_like(x_TD)
    if torch.is_grad_enabled() and (x_TD.requires_grad or weights_TK.requires_grad):
        raise UsageError(
            "a gradient through the experts is wanted, and offmoe computes none; call engine.model within "
            "torch.no_grad(), or train with transformers"
        )
    with torch.no_grad():
        return binding.executor.run_layer(
            binding.layer_idx, binding.math, binding.num_experts, x_TD, ids_TK, weights_TK
        )


def is_observed(handle: int) -> bool:
    """Somebody wants to see the state that this layer's router chooses from."""
    binding = _binding_of_handle.get(handle)
    return binding is not None and binding.observer is not None


@cache
def define_experts_operators() -> None:
    """Operators for graphs, once for the process.

    `torch.ops.offmoe.experts(x_TD, ids_TK, weights_TK, handle, state_TX=None) -> y_TD`: `state_TX` is shown to the
    layer's observer first. Its tag ends a CUDA graph before it and begins another behind it: it reads the ids on the
    host and waits for copies.
    `torch.ops.offmoe.resident_experts(x_TD, ids_TK, weights_TK, handle) -> y_TD`: of a layer whose experts are all on
    the device. It is part of the graph around it, and counts nothing: a graph that is replayed runs no Python.
    """
    experts = operators.custom_op(
        "offmoe::experts", _experts_operator, mutates_args=(), tags=(torch._C.Tag.cudagraph_unsafe,)
    )
    experts.register_fake(lambda x_TD, ids_TK, weights_TK, handle, state_TX=None: x_TD.new_empty(x_TD.shape))
    resident = operators.custom_op("offmoe::resident_experts", _resident_operator, mutates_args=())
    resident.register_fake(lambda x_TD, ids_TK, weights_TK, handle: x_TD.new_empty(x_TD.shape))


def binding_of_handle(handle: int) -> LayerBinding:
    """The binding that a graph names. Raises EngineClosedError when its model is gone."""
    binding = _binding_of_handle.get(handle)
    if binding is None:
        raise EngineClosedError("the engine is closed; load the model again")
    return binding


def _resident_operator(x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, handle: int) -> torch.Tensor:
    binding = binding_of_handle(handle)
    executor: Any = binding.executor
    y_TD: torch.Tensor = executor.look_up(binding.layer_idx, x_TD, ids_TK, weights_TK)
    return y_TD


def _experts_operator(
    x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, handle: int,
    state_TX: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    binding = binding_of_handle(handle)
    observer = binding.observer
    if observer is not None and state_TX is not None:
        observer.observe_state(binding.layer_idx, state_TX)
    return _run(binding, x_TD, ids_TK, weights_TK)
