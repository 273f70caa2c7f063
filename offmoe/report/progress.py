"""Progress of anything that may take over a second: a bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from offmoe.base.units import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

SHOW_AFTER_S = 1.0
PLAIN_EVERY_S = 5.0


class ProgressReporter:
    """Callable as `progress(stage, done, total)`; use as a context manager so that the bar is taken down.

    Nothing is shown for stages that end within a second. Writes to `stream` (stderr), never to stdout.
    """

    def __init__(
        self, *, quiet: bool = False, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
        detail: Callable[[], str] = lambda: "",
    ) -> None:  # fmt: skip
        """`detail()`: what else is said of the work so far, such as the bytes that were read."""
        self._stream = stream or sys.stderr
        self._quiet, self._clock, self._detail = quiet, clock, detail
        self._stage, self._begin, self._last_line = "", clock(), 0.0
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` units of `stage`; a new stage name starts its own clock."""
        now = self._clock()
        if stage != self._stage:
            self.close()
            self._stage, self._begin, self._last_line = stage, now, now
        if self._quiet or now - self._begin < SHOW_AFTER_S:
            return
        if self._stream.isatty():
            self._draw(done, total)
        elif now - self._last_line >= PLAIN_EVERY_S:
            self._last_line = now
            elapsed = now - self._begin
            eta = format_seconds(elapsed * (total - done) / done) if done else "unknown"
            detail = f", {text}" if (text := self._detail()) else ""
            self._stream.write(
                f"{stage}: {100 * done // max(1, total)}%{detail}, {format_seconds(elapsed)}, ETA {eta}\n"
            )
            self._stream.flush()

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
                console=Console(file=self._stream), transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self._stage, total=total, detail="")
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total, detail=self._detail())

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> ProgressReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
