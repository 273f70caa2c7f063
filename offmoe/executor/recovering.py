"""Ctrl-C may come between any two lines; this puts the cache's books in order before anybody looks at them again.

`Executor` ends every call without a hold or an unfinished read, also when a read fails. An exception that a signal
raises inside the bookkeeping itself is beyond that: a slot may be off the free list and in no map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from offmoe.base.errors import OffmoeError
from offmoe.base.forks import OneProcess
from offmoe.executor.cpu_rows import CpuRows
from offmoe.executor.executor import Executor
from offmoe.executor.joined import JoinedExperts
from offmoe.kernels.reference import ExpertMath

Result = TypeVar("Result")


class RecoveringExecutor:
    """Runs layers as `executor` does. After a call was broken off, the cache is at rest and keeps what is whole."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._in_call = False
        self._process = OneProcess()

    def run_layer(
        self, layer_idx: int, math: ExpertMath, num_experts: int,
        x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The experts' weighted sum, (T, D) in x's dtype."""
        return self.guard(
            partial(self._executor.run_layer, layer_idx, math, num_experts, x_TD, expert_ids_TK, weights_TK)
        )

    def joined(self) -> JoinedExperts | None:
        """Its experts for calls that compute several layers, made within `guard`; None where rows are not the CPU
        kernels'.
        """
        rows = self._executor.rows
        return JoinedExperts(self._executor, rows) if isinstance(rows, CpuRows) else None

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Context for a token that is computed a second time: the routers' choices are not recorded."""
        recorder = self._executor.recorder
        recorder.is_paused = True
        try:
            yield
        finally:
            recorder.is_paused = False

    def guard(self, call: Callable[[], Result]) -> Result:
        """Run `call`, which uses the executor, and return its result. Raises EngineBusyError in a forked child."""
        self._process.check()
        if self._in_call:  # a second Ctrl-C broke off the recovery of the call before
            self._executor.recover()
        self._in_call = True
        try:
            result = call()
        except OffmoeError:  # a read that failed: the executor has cleaned up
            self._in_call = False
            raise
        except BaseException:
            self._executor.recover()
            self._in_call = False
            raise
        self._in_call = False
        return result
