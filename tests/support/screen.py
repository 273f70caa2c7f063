"""A terminal's screen, as far as offmoe steers one: rows, a cursor, and what scrolled out at the top."""

from __future__ import annotations

import re

from rich.cells import cell_len

_STEP = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])|\x1b(?!\[)|[^\x1b]")


class Screen:
    """`write` as to a terminal of `columns` x `height`; `text` is everything that was ever shown, as it stands now."""

    def __init__(self, columns: int = 80, height: int = 24) -> None:
        self.columns, self.height = columns, height
        self.rows, self._gone = [""], list[str]()
        self._row = self._column = 0

    def size(self) -> tuple[int, int]:
        return self.columns, self.height

    def write(self, text: str) -> int:
        for found in _STEP.finditer(text):
            self._take(found[0], found[1], found[2])
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        return "\n".join(row.rstrip() for row in [*self._gone, *self.rows]).rstrip("\n")

    def resize(self, columns: int) -> None:
        """Rows that are too long are wrapped, as most terminals do; the cursor stays behind its text."""
        assert self._column == cell_len(self.rows[-1]) and self._row == len(self.rows) - 1
        rows = [row[i : i + columns] for row in self.rows for i in range(0, max(1, len(row)), columns)]
        self.columns = columns
        self._gone += rows[: max(0, len(rows) - self.height)]
        self.rows = rows[-self.height :]
        self._row, self._column = len(self.rows) - 1, len(self.rows[-1])

    def _take(self, step: str, argument: str | None, kind: str | None) -> None:
        row = self.rows[self._row]
        if kind == "A":
            assert 0 < int(argument or 1) <= self._row, f"{argument=} {self._row=}: beyond the top of the screen"
            self._row -= int(argument or 1)
        elif kind == "K":
            assert self._column < self.columns, "a terminal would clear the last letter"
            self.rows[self._row] = row[: self._column]
        elif kind == "J":
            self.rows[self._row :] = [row[: self._column]]
        elif kind is not None:
            assert kind == "m" or argument == "?2026", f"{step=}"
        elif step == "\r":
            self._column = 0
        elif step == "\n":
            self._column = 0
            self._down()
        else:
            assert step.isprintable(), f"{step=}"
            if self._column + cell_len(step) > self.columns:  # a line that is too long goes on in the next row
                self._column = 0
                self._down()
                row = self.rows[self._row]
            self.rows[self._row] = row[: self._column].ljust(self._column) + step + row[self._column + 1 :]
            self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self.rows):
            self.rows.append("")
        if len(self.rows) > self.height:
            self._gone.append(self.rows.pop(0))
            self._row -= 1
