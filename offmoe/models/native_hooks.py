"""Hooks on modules that the fused step skips: it runs where there are none, or only such as it can tell itself.

Hooks that watch routers (models/routing.py) are on modules all the time, and sleep most of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules


class ObserverHook(ABC):
    """A pre-hook that does nothing but to tell somebody of its module's input."""

    @abstractmethod
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The module is about to be called."""

    @abstractmethod
    def tell(self, state: torch.Tensor) -> None:
        """The same for this input, where the module is not called."""


class Hooks:
    """The hooks of `modules` and of `told`, and those that torch calls for every module."""

    def __init__(self, modules: Iterable[nn.Module], told: Sequence[nn.Module] = ()) -> None:
        """`told`: modules whose ObserverHooks the step tells itself."""
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
        return not any(self._tables) and all(
            isinstance(hook, ObserverHook) for table in self._told for hook in table.values()
        )
