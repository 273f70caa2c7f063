"""Rows at the end of a terminal that are rewritten in place while they grow.

Only what differs is written, each row over itself, in one write: nothing is cleared first, so nothing flickers. Rows
that scrolled out of the screen cannot be reached any more; they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from rich.cells import cell_len

from offmoe.report.markdown_rows import plain

# Terminals that know it show what is between at once; others ignore it.
_HOLD, _RELEASE = "\x1b[?2026h", "\x1b[?2026l"


class LiveRows:
    """`show` all rows from the first one that may still change; between calls the cursor stands behind the last one."""

    def __init__(self, stream: TextIO, size: Callable[[], tuple[int, int]]) -> None:
        """`size()`: columns and rows of the screen, now."""
        self._stream, self._size = stream, size
        self._shown: list[str] = []
        self._top = 0  # the first of them that did not scroll out of the screen
        self._begun, self._columns = False, size()[0]

    def show(self, rows: list[str], *, num_final: int = 0) -> None:
        """Let `rows` stand where the last ones stood; the first `num_final` will never be given again."""
        if not rows:
            return
        columns, height = self._size()
        heights = [_height(row, columns) for row in self._shown]
        top = self._top
        while sum(heights[top:]) > height - 1:
            top += 1
        same = 0
        while same < min(len(rows), len(self._shown)) and rows[same] == self._shown[same]:
            same += 1
        first = max(top, min(same, len(rows) - 1))  # the cursor ends behind the last row, so that is always written
        source = first
        if columns != self._columns and top > 0:  # the words above are in other rows now
            first, source = top, _row_after(_num_marks(self._shown[:top]), rows)
            top = source
        if same < max(len(rows), len(self._shown)):
            text = self._go_to(first, heights) + "\n".join(_cleared(row, columns) for row in rows[source:]) + "\x1b[J"
            self._stream.write(_HOLD + text + _RELEASE)
            self._stream.flush()
        self._begun, self._columns = True, columns
        self._shown, self._top = rows[num_final:], max(0, top - num_final)

    def end(self) -> None:
        """The cursor goes to a line of its own."""
        if self._begun:
            self._stream.write("\n")
            self._stream.flush()
        self._shown, self._top, self._begun = [], 0, False

    def _go_to(self, first: int, heights: list[int]) -> str:
        """To the begin of row `first`, of those shown or just behind them."""
        if first == len(heights):
            return "\n" if self._begun else "\r"
        up = sum(heights[first:]) - 1
        return (f"\x1b[{up}A" if up else "") + "\r"


def _height(row: str, columns: int) -> int:
    """Rows of the screen that `row` takes: more than one when the terminal was made narrower since, and wrapped it."""
    return max(1, -(-cell_len(plain(row)) // max(1, columns)))


def _cleared(row: str, columns: int) -> str:
    """`row`, and an end of its line without what stood there. A row that fills the last column has no such rest."""
    length = cell_len(plain(row))
    return row if length and length % max(1, columns) == 0 else f"{row}\x1b[K"


def _num_marks(rows: list[str]) -> int:
    return sum(len("".join(plain(row).split())) for row in rows)


def _row_after(num_marks: int, rows: list[str]) -> int:
    """The last row before which no more than `num_marks` characters stand, blanks not counted."""
    return max((i for i in range(len(rows)) if _num_marks(rows[:i]) <= num_marks), default=0)
