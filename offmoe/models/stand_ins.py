"""Other forwards for a model's modules while one call runs, and models in which nothing may stand in.

torch.compile reads a model's modules for as long as it captures, maybe on a thread of its own: a stand-in put there
meanwhile would be in its graph, or fail its guards. So modules being captured are refused stand-ins, and a capture
begins when there are none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn

_changed = threading.Condition()
_captured: WeakSet[nn.Module] = WeakSet()
_stood_in: WeakSet[nn.Module] = WeakSet()


@contextmanager
def captured(model: nn.Module) -> Iterator[None]:
    """Within: no stand-ins in `model`. Waits for those that are there, a call of a module each."""
    modules = list(model.modules())
    with _changed:
        _changed.wait_for(lambda: _stood_in.isdisjoint(modules))
        _captured.update(modules)
    try:
        yield
    finally:
        with _changed:
            _captured.difference_update(modules)


@contextmanager
def stand_in(forwards: Mapping[nn.Module, Callable[..., Any] | None]) -> Iterator[bool]:
    """Within: each module runs its forward of `forwards`, None for the code of its class. Afterwards it runs what
    it ran before; where the stand-in was taken away meanwhile, its own code.

    False where a module is being captured: then all run what they ran.
    """
    with _changed:
        may_stand_in = _captured.isdisjoint(forwards)
        if may_stand_in:
            _stood_in.update(forwards)
    if not may_stand_in:
        yield False
        return
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            _set_forward(module, forward)
        yield True
    finally:
        for module, forward in before.items():
            if forwards[module] is None or "forward" in vars(module):
                _set_forward(module, forward)
        with _changed:
            _stood_in.difference_update(forwards)
            _changed.notify_all()


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward
