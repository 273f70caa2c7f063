"""Hooks on modules that the fused step skips: it runs where there are none, or only such as it can tell itself.

What watches routers (prefetch/lookahead.py) has its hooks on modules all the time, and sleeps most of it. A mark on a
hook says how to tell it without calling the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
        """`told`: modules whose marked pre-hooks the step tells itself."""
        self._tables: list[dict[int, Any]] = [
            torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks,
        ]  # fmt: skip
        for module in dict.fromkeys(modules):
            if module not in told:
                self._tables += [module._forward_hooks, module._forward_pre_hooks]
        self._tables += [module._forward_hooks for module in told]
        self._told: list[dict[int, Any]] = [module._forward_pre_hooks for module in told]

    @property
    def may_pass(self) -> bool:
        """Nobody but who can be told would be called."""
        return not any(self._tables) and all(hasattr(hook, _MARK) for table in self._told for hook in table.values())
