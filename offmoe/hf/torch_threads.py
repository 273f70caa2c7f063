"""One token beside the CPU kernels: torch computes on one thread.

What torch has left to do there is small. Its own threads would go on looking for work for about a millisecond after
each operation that was shared among them, and the kernels' threads would have to share the cores with them. Measured on
two cores: three layers of OLMoE's shape 17 to 21 ms a token instead of 23 to 26, of DeepSeek-V2-Lite's 31 instead of
34, and with another program running 30 instead of 235. A product of many rows, as latent attention makes of the whole
context, is worth all threads, and so is torch's attention over a long one.

Concurrency. `torch.set_num_threads` also sets what threads begin with that use torch for the first time, so around
each token it would leave threads that a program starts meanwhile with one for ever (26 of 60). OpenMP's own setting,
and that of MKL, are of the calling thread alone, and torch reads its number from there.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch

from offmoe.kernels.products import multiply
from offmoe.machine.control_groups import processor_quota
from offmoe.machine.memory import num_cores

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


def keep_to_quota() -> None:
    """Let torch use no more threads than a container's quota pays for: it counts cores, and knows no quotas.

    For the whole process, once, when a model is loaded; without a quota nothing changes.
    """
    if processor_quota() is not None and torch.get_num_threads() > num_cores():
        torch.set_num_threads(num_cores())


class TokenStep(Protocol):
    """The model's forward of the next ids, after `position` tokens."""

    position: int

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits."""


class _OwnThread:
    """The number of torch's threads for work of the calling thread, and no other's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """`library`: torch's. Raises AttributeError where it has no OpenMP."""
        self._set_openmp = library.omp_set_num_threads
        self._set_openmp.argtypes, self._set_openmp.restype = (ctypes.c_int,), None
        self._set_mkl = getattr(library, "MKL_Set_Num_Threads_Local", None)
        if self._set_mkl is not None:
            self._set_mkl.argtypes, self._set_mkl.restype = (ctypes.c_int,), ctypes.c_int

    def set(self, number: int, of_mkl: int) -> int:
        """Use `number` threads, and MKL `of_mkl` (0: as many as the process). Returns what `of_mkl` was before."""
        self._set_openmp(number)
        return self._set_mkl(of_mkl) if self._set_mkl is not None else 0


@cache
def _own_thread() -> _OwnThread | None:
    """None where torch's number cannot be set for one thread: then it stays as it is."""
    names = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib"}
    try:
        own = _OwnThread(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / names[sys.platform])))
    except (OSError, AttributeError, KeyError):
        return None
    before = torch.get_num_threads()
    of_mkl = own.set(1, 1)
    has_worked = torch.get_num_threads() == 1
    own.set(before, of_mkl)
    return own if has_worked else None


class TorchThreads:
    """torch's threads for one model. `unread`: layers whose experts torch computes after all.

    With such layers, before `begin`, and where linears are torch's, nothing changes.
    """

    def __init__(self) -> None:
        self._unread: Mapping[int, str] | None = None
        self._all = self._all_of_mkl = 0  # those to go back to, while a token is computed
        self._attends = False

    def begin(self, unread: Mapping[int, str], *, attends: bool) -> None:
        """From now on: the kernels have all linears of the model; `attends`: its attention too."""
        self._attends, self._unread = attends, unread

    def run_token(self, forward: TokenStep, ids: torch.Tensor) -> torch.Tensor:
        """`forward(ids)`, for one token."""
        is_long = forward.position > LONG_CONTEXT and not self._attends
        own = _own_thread()
        if self._unread is None or self._unread or is_long or own is None:
            return forward(ids)
        self._all = torch.get_num_threads()
        self._all_of_mkl = own.set(1, 1)
        try:
            return forward(ids)
        finally:
            own.set(self._all, self._all_of_mkl)
            self._all = 0

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Call `multiply`; for many rows on all threads, within `run_token` too."""
        own = _own_thread()
        if self._all <= 1 or x.numel() * weight.shape[0] < MANY_PRODUCTS or own is None:
            return multiply(x, weight, bias)
        own.set(self._all, self._all_of_mkl)
        try:
            return multiply(x, weight, bias)
        finally:
            own.set(1, 1)
