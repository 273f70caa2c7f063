"""Run a model while the n-th operator new of the CPU kernels fails, n = 1, 1 + STRIDE, ...; a program of its own.

    LD_PRELOAD=LIBRARY python failing_new.py LIBRARY MODEL STRIDE

A model is loaded, and 4 tokens are generated. The last line is JSON: how many runs were refused, how many calls there
are, and what was wrong; an exit code of 1 where anything was.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from engines import PROMPT, open_tiny

from offmoe.core.errors import BudgetError
from offmoe.kernels.cpu import loader

_KEPT = ("offmoe_close", "offmoe_isa", "offmoe_abi_version")


class Watched:
    """The kernels' library, whose functions ask the library of operator new to count while they run."""

    def __init__(self, library: ctypes.CDLL, new: ctypes.CDLL) -> None:
        self._library, self._new = library, new

    def __getattr__(self, name: str) -> Any:
        function, new = getattr(self._library, name), self._new
        if name in _KEPT:
            return function

        def call(*args: object) -> Any:
            new.watch(1)
            try:
                return function(*args)
            finally:
                new.watch(0)

        return call


class Tally:
    """Outcomes of operations, each run with the n-th call failing for n = 1, 1 + stride, ... until it makes fewer."""

    def __init__(self, new: ctypes.CDLL) -> None:
        self._new = new
        self.refused, self.calls, self.wrong = 0, 0, list[str]()

    def each_nth(self, operation: Callable[[], tuple[int, ...]], expected: tuple[int, ...], stride: int) -> None:
        """`operation` gives `expected`, or BudgetError; and without a failure afterwards it gives `expected`."""
        for nth in itertools.count(1, stride):
            self._new.fail(nth)
            try:
                found = operation()
            except BudgetError as error:
                found = expected
                self.refused += "memory ran out" in str(error)
            except Exception as error:  # noqa: BLE001 - reported
                found = (-1,)
                self.wrong.append(repr(error))
            num_calls = self._new.count()
            self._new.fail(0)
            if (found, operation()) != (expected, expected):
                self.wrong.append(f"other ids after call {nth}")
            if num_calls < nth:
                self.calls += num_calls
                return


def main(new_path: str, model: str, stride: int) -> int:
    """Count outcomes and print them."""
    new = ctypes.CDLL(new_path)
    new.count.restype, new.fail.argtypes = ctypes.c_int64, (ctypes.c_int64,)
    real = loader._library
    loader._library = lambda: Watched(real(), new)  # type: ignore[assignment,return-value]
    tally = Tally(new)
    with open_tiny(Path(model), tell=None) as engine:
        generate = partial(engine.generate, PROMPT, reuse=False, max_new_tokens=4, ignore_eos=True)
        expected = generate().token_ids
        tally.each_nth(lambda: generate().token_ids, expected, stride)

    def load() -> tuple[int, ...]:
        with open_tiny(Path(model), tell=None):
            return expected

    tally.each_nth(load, expected, 20 * stride)
    sys.stdout.write(json.dumps({"refused": tally.refused, "calls": tally.calls, "wrong": tally.wrong}) + "\n")
    return int(bool(tally.wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
