"""One token beside the CPU kernels: torch computes on one thread.

What torch has left to do there is small. Its own threads would go on looking for work for about a millisecond after
each operation that was shared among them, and the kernels' threads would have to share the cores with them. Measured on
two cores: three layers of OLMoE's shape 17 to 21 ms a token instead of 23 to 26, of DeepSeek-V2-Lite's 31 instead of
34, and with another program running 30 instead of 235. A product of many rows, as latent attention makes of the whole
context, is worth all threads, and so is torch's attention over a long one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache, partial
from typing import Protocol

import torch
from torch import nn

# Multiplications of one product from which all threads are faster: some milliseconds of one thread.
MANY_PRODUCTS = 1 << 28
# Tokens of context from which attention by torch is no slower on all threads.
LONG_CONTEXT = 1024


@cache
def spare_forked_children() -> None:
    """Let children that are forked from now on compute on one of torch's threads, and not wait for their parent's.

    GNU's OpenMP waits for ever in a child for the threads that its parent had. torch's data loaders do the same.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class Step(Protocol):
    """The model's forward of the next ids, after `position` tokens."""

    position: int

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits."""


class TorchThreads:
    """Of one model. `unread`: layers whose experts torch computes after all; with such, and before `begin`, and where
    linears are torch's, nothing changes.
    """

    def __init__(self) -> None:
        self._unread: Mapping[int, str] | None = None
        self._all = 0  # those to go back to, while a token is computed
        self._attends = False

    def begin(self, model: nn.Module, unread: Mapping[int, str], *, attends: bool) -> None:
        """From now on, if the kernels have all linears of `model`; `attends`: its attention too."""
        self._attends = attends
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if all("forward" in vars(module) for module in linears):
            self._unread = unread

    def run_token(self, forward: Step, ids: torch.Tensor) -> torch.Tensor:
        """`forward(ids)`, for one token."""
        is_long = forward.position > LONG_CONTEXT and not self._attends
        if self._unread is None or self._unread or is_long:
            return forward(ids)
        self._all = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return forward(ids)
        finally:
            torch.set_num_threads(self._all)
            self._all = 0

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As F.linear; of many rows on all threads, within `run_token` too."""
        if self._all <= 1 or x.numel() * weight.shape[0] < MANY_PRODUCTS:
            return nn.functional.linear(x, weight, bias)
        torch.set_num_threads(self._all)
        try:
            return nn.functional.linear(x, weight, bias)
        finally:
            torch.set_num_threads(1)
