"""Hooks on modules that a native step would pass by: it may where there are none, or where it can tell them itself.

What watches routers (prefetch/lookahead.py) has its hooks on modules all the time, and sleeps most of it. A mark on a
hook says how to tell it without calling the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

Tell = Callable[[torch.Tensor], None]
_MARK = "offmoe_tell"


def mark_observer(hook: Callable[..., None], tell: Tell) -> None:
    """A pre-hook that does nothing but to tell somebody of the module's input; `tell(input)` does the same."""
    setattr(hook, _MARK, tell)


def marked_tell(hook: Callable[..., None]) -> Tell:
    """Return the function that tells the observer of a marked hook. `hook` was marked."""
    tell: Tell = getattr(hook, _MARK)
    return tell


class Hooks:
    """The hooks of `modules` and of `told`, and those that torch calls for every module."""

    def __init__(self, modules: Iterable[nn.Module], told: Sequence[nn.Module] = ()) -> None:
        """`told`: modules whose marked hooks are told of by `tell`, by their places in it."""
        self._tables: list[dict[int, Any]] = [
            torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks,
        ]  # fmt: skip
        for module in dict.fromkeys(modules):
            if module not in told:
                self._tables += [module._forward_hooks, module._forward_pre_hooks]
        self._tables += [module._forward_hooks for module in told]
        self._told: list[dict[int, Any]] = [module._forward_pre_hooks for module in told]

    @classmethod
    def joined(cls, several: Iterable[Hooks]) -> Hooks:
        """All of them, to be asked at once whether they may be passed by."""
        hooks = cls(())
        for each in several:
            hooks._tables += each._tables[2:]
            hooks._told += each._told
        return hooks

    @property
    def may_pass(self) -> bool:
        """Nobody but who can be told would be called."""
        return not any(self._tables) and all(hasattr(hook, _MARK) for table in self._told for hook in table.values())

    def tell(self, place: int, state: torch.Tensor) -> None:
        """The module at that place of `told` would be given `state` now."""
        for hook in self._told[place].values():
            getattr(hook, _MARK)(state)


@contextmanager
def without_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within: modules are called without theirs, to try them out unseen."""
    tables = [table for module in modules for table in (module._forward_hooks, module._forward_pre_hooks)]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)
