"""Calls of the transformers model itself: one at a time, without gradients, and never saved without its experts.

The engine's parts (cache, reads, kernels) serve one call at a time. A second call from another thread is told so before
it touches them; `torch.nn.Module`'s own hooks around the whole model's forward do that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from offmoe.base.errors import EngineBusyError, UsageError


class OneCallAtATime:
    """Around every forward of a model. A thread may call it again within a call of its own."""

    def __init__(self) -> None:
        self._lock, self._owner, self._depth = threading.Lock(), 0, 0

    def enter(self, *_: object) -> None:
        """Before a call. Raises EngineBusyError while another thread is in one."""
        if torch.compiler.is_dynamo_compiling():
            return
        if self._owner != threading.get_ident():
            if not self._lock.acquire(blocking=False):
                raise EngineBusyError("the model is computing for another thread; wait for it, or load a second engine")
            self._owner = threading.get_ident()
        self._depth += 1

    def leave(self, *_: object) -> None:
        """After a call, whatever became of it; also after one that was refused, which changes nothing."""
        if torch.compiler.is_dynamo_compiling() or self._owner != threading.get_ident():
            return
        self._depth -= 1
        if self._depth == 0:
            self._owner = 0
            self._lock.release()


def guard_calls(model: PreTrainedModel, folder: Path) -> Callable[[], None]:
    """Let `model`, whose experts are in the files of `folder`, be called by one thread at a time. No parameter wants a
    gradient from now on: through experts there is none (models/seam.py). Saving it is refused. Returns what takes the
    hooks away.
    """
    model.requires_grad_(False)
    calls = OneCallAtATime()
    hooks = [
        model.register_forward_pre_hook(calls.enter, prepend=True),
        model.register_forward_hook(calls.leave, always_call=True),
    ]

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            f"engine.model has no experts in memory, so a saved one would lack them; copy {folder}, or write a smaller "
            "checkpoint with offmoe quantize"
        )

    model.save_pretrained = refuse

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove
