"""Ctrl-C at a chosen line."""

from __future__ import annotations

import sys
from collections.abc import Collection
from types import FrameType
from typing import Any

Line = tuple[str, int]


class Interrupt:
    """Raises KeyboardInterrupt before `line` first runs, or before the `number`-th line of all runs.

    Lines are those of `files`, but for functions called `recover`. `ran` has each that ran, in order, once.
    """

    def __init__(self, files: Collection[str], *, line: Line | None = None, number: int | None = None) -> None:
        self._files, self._line, self._left = files, line, number or 0
        self.ran = dict[Line, None]()

    def __enter__(self) -> Interrupt:
        self._previous = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self._previous)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self._files or frame.f_code.co_name == "recover":
            return None
        if event == "line":
            line = (frame.f_code.co_filename, frame.f_lineno)
            is_first = line not in self.ran
            self.ran[line] = None
            self._left -= 1
            if self._left == 0 or (is_first and line == self._line):
                raise KeyboardInterrupt
        return self._trace
