"""Calls and answers of a decoder layer's modules in one forward.

Tensors are copied when they are seen, since model code changes some of them in place later; parameters and buffers
handed from module to module are kept as they are, so that they are recognised. Tensors are compared by value, not by
identity: a cast or a reshape between two modules leaves the same numbers in a new tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


def by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    """A call's arguments by position or name."""
    arguments: dict[int | str, Any] = dict(enumerate(args))
    arguments.update(kwargs)
    return arguments


@dataclass(eq=False, slots=True)
class TracedCall:
    """One call of a module. `begin` and `end` count the events of the layer: a call encloses those in between."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    begin: int
    end: int = 0
    output: Any = None

    def encloses(self, other: TracedCall) -> bool:
        """`other` happened within this call."""
        return self.begin < other.begin and other.end < self.end

    def arguments(self) -> dict[int | str, Any]:
        """By position or name."""
        return by_name(self.args, self.kwargs)


@dataclass(slots=True)
class LayerTrace:
    """All calls within one call of a decoder layer, in the order in which they began; the layer's own is the first."""

    num_tokens: int
    residents: dict[int, tuple[nn.Module, str]]
    calls: list[TracedCall] = field(default_factory=list)

    @property
    def layer(self) -> TracedCall:
        """The decoder layer's own call."""
        return self.calls[0]

    def count(self, module: nn.Module) -> int:
        """Number of a module's calls."""
        return sum(call.module is module for call in self.calls)

    def call_of(self, module: nn.Module) -> TracedCall:
        """The first call of a module."""
        return next(call for call in self.calls if call.module is module)

    def producers(self, tensor: torch.Tensor, before: TracedCall) -> list[TracedCall]:
        """Calls that ended before `before` began and answered with `tensor`; enclosing ones before enclosed ones."""
        return [call for call in self.calls if call.end < before.begin and find_tensor(call.output, tensor) is not None]


class LayerTracer:
    """Hooks on a decoder layer and all modules in it, except those inside `leaves`. `trace` is the latest call's."""

    def __init__(self, layer: nn.Module, leaves: Iterable[nn.Module], num_tokens: int) -> None:
        self.trace: LayerTrace | None = None
        self._active = True
        self._num_tokens, self._layer, self._events = num_tokens, layer, 0
        self._open: list[TracedCall] = []
        inside = {id(child) for leaf in leaves for child in leaf.modules() if child is not leaf}
        modules = [module for module in layer.modules() if id(module) not in inside]
        self._residents = {
            id(tensor): (module, name)
            for module in modules
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }
        self._handles = [
            handle
            for module in modules
            for handle in (
                module.register_forward_pre_hook(self._begin, with_kwargs=True),
                module.register_forward_hook(self._end),
            )
        ]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within: calls are not recorded. Afterwards the trace is forgotten."""
        self._active = False
        yield
        self.trace, self._active = None, True

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._active:
            return
        if module is self._layer:
            self._events, self._open = 0, []
            self.trace = LayerTrace(self._num_tokens, self._residents)
        if self.trace is not None:
            self._events += 1
            call = TracedCall(module, self._copy(args), self._copy(kwargs), begin=self._events)
            self.trace.calls.append(call)
            self._open.append(call)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._active and self._open:
            self._events += 1
            call = self._open.pop()
            assert call.module is module, f"{type(call.module).__name__} was left by an exception"
            call.end, call.output = self._events, self._copy(output)

    def _copy(self, value: Any) -> Any:
        match value:
            case torch.Tensor():
                return value if id(value) in self._residents else value.detach().clone()
            case tuple() | list():
                return tuple(self._copy(item) for item in value)
            case dict():
                return {name: self._copy(item) for name, item in value.items()}
            case _:
                return value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of a module's answer, in order."""
    match value:
        case torch.Tensor():
            yield value
        case tuple() | list():
            for item in value:
                yield from tensors_in(item)
        case dict():
            for item in value.values():
                yield from tensors_in(item)


def find_tensor(output: Any, wanted: torch.Tensor) -> int | None:
    """Which tensor of `output` holds the same numbers as `wanted` (cast to its dtype, in any shape); None: no one."""
    for idx, tensor in enumerate(tensors_in(output)):
        if same_values(tensor, wanted):
            return idx
    return None


def same_values(tensor: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal after casting to `wanted`'s dtype, and telling: all zeros are equal to nothing."""
    if tensor.numel() != wanted.numel() or tensor.is_floating_point() != wanted.is_floating_point():
        return False
    return torch.equal(tensor.reshape(-1).to(wanted.dtype), wanted.reshape(-1)) and (
        bool(wanted.any()) or not wanted.is_floating_point()
    )
