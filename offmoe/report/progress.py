"""Progress of anything that may take over a second: a bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, TypeVar

from offmoe.core.units import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Reporter = TypeVar("Reporter", bound="ProgressReporter")

SHOW_AFTER_S = 1.0
PLAIN_EVERY_S = 5.0
# A terminal with fewer columns has no room for a bar beside the numbers.
BAR_COLUMNS = 66


class ProgressReporter:
    """Callable as `progress(stage, done, total)`; use as a context manager so that the bar is taken down.

    Nothing is shown for stages that end within a second. Writes to `stream` (stderr), never to stdout. On a terminal
    the bar is there after that second and its clock runs, whether or not it was called again.
    """

    def __init__(
        self, *, quiet: bool = False, at_once: bool = False, stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic, detail: Callable[[], str] = lambda: "",
    ) -> None:  # fmt: skip
        """`at_once`: on a terminal the bar is there from the first call. `detail()`: what else is said of the work so
        far, such as the bytes that were read. Asked by the caller's thread only, when it calls.
        """
        self._stream = stream or sys.stderr
        self._quiet, self._clock, self._detail = quiet, clock, detail
        self._at_once = at_once and self._stream.isatty()
        self._stage, self._begin, self._last_line = "", clock(), 0.0
        # The timer's thread may draw a stage's first bar: the lock is held while a bar is made, changed or taken down.
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` units of `stage`; a new stage name starts its own clock. A `total` of 0 is not known."""
        now = self._clock()
        if stage != self._stage:
            self.close()
            self._stage, self._begin, self._last_line = stage, now, now
            if not self._quiet and not self._at_once and self._stream.isatty():
                self._draw_later(done, total)
        if self._quiet or (now - self._begin < SHOW_AFTER_S and not self._at_once):
            return
        if self._stream.isatty():
            detail = self._detail()
            with self._lock:
                self._draw(done, total, detail)
        elif now - self._last_line >= PLAIN_EVERY_S:
            self._last_line = now
            elapsed = now - self._begin
            eta = format_seconds(elapsed * (total - done) / done) if done else "unknown"
            detail = f", {text}" if (text := self._detail()) else ""
            share, eta = (f"{100 * done // total}%", f", ETA {eta}") if total else ("under way", "")
            self._stream.write(f"{stage}: {share}{detail}, {format_seconds(elapsed)}{eta}\n")
            self._stream.flush()

    def _draw_later(self, done: int, total: int) -> None:
        detail = self._detail()

        def draw() -> None:
            with self._lock:
                if self._timer is timer and self._bar is None:
                    self._draw(done, total, detail)

        self._timer = timer = threading.Timer(SHOW_AFTER_S, draw)
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # the system has no more threads: the bar comes with a later call
            timer.start()

    def _draw(self, done: int, total: int, detail: str) -> None:
        """Under the lock."""
        if self._bar is None:
            bar = self._make_bar()
            try:
                bar.start()
            except RuntimeError:  # its clock needs a thread, and the system has none
                bar.console.show_cursor(True)
                self._quiet = True
                return
            self._bar = bar
            self._task = self._bar.add_task(self._stage, total=total or None, detail=detail, share="", eta="")
            task = self._bar.tasks[0]
            task.start_time = (task.start_time or 0.0) - (self._clock() - self._begin)
        assert self._task is not None
        share = f"{100 * done // total:>3}%" if total else ""
        self._bar.update(
            self._task, completed=done, total=total or None, detail=detail, share=share, eta="ETA" if total else ""
        )

    def _make_bar(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.table import Column

        console = Console(file=self._stream)
        share, detail = TextColumn("{task.fields[share]}"), TextColumn("{task.fields[detail]}")
        if console.width < BAR_COLUMNS:  # the stage's name is cut where it has to be
            stage = TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=1))
            left = (TextColumn("{task.fields[eta]}"), TimeRemainingColumn(compact=True))
            return Progress(stage, share, detail, *left, console=console, transient=True, expand=True)
        return Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), share, detail, TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"), TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip

    def close(self) -> None:
        """Take the bar down."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def __enter__(self: Reporter) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
