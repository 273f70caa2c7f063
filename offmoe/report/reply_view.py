"""Views that show a reply as it comes: formatted on a terminal, as it is anywhere else."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from offmoe.report.live_rows import LiveRows
from offmoe.report.markdown_rows import RowRenderer, finished_length, mended, printable

_SHOW_EVERY_S = 0.06
# Of the time, what drawing may take: the processor is busy with the model.
_DRAWING_SHARE = 0.15


class ReplyView(Protocol):
    """Text goes in by `add`; `end` shows what is left and ends the line."""

    def add(self, text: str, *, reasoning: bool = False) -> None:
        """More of the reply."""

    def end(self) -> None:
        """Nothing more comes."""


def make_view(*, markdown: bool, color: bool) -> ReplyView:
    """For standard output as it is. `markdown` False: text as it is, on a terminal too."""
    if not is_smart_terminal(sys.stdout) or not markdown:
        return TextView()
    return MarkdownView(sys.stdout, color=color)


def is_smart_terminal(stream: TextIO) -> bool:
    """A terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in {"dumb", "unknown"}


class TextView:
    """Text as it comes. Reasoning goes to standard error where the reply itself is not read on a terminal."""

    def __init__(self, stream: TextIO | None = None, aside: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._on_terminal = self._stream.isatty()
        self._aside = self._stream if self._on_terminal else (aside or sys.stderr)
        self._reasoning: bool | None = None
        self._last = ""

    def add(self, text: str, *, reasoning: bool = False) -> None:
        """See ReplyView."""
        if not text:
            return
        stream = self._aside if reasoning else self._stream
        if reasoning != bool(self._reasoning):
            if self._reasoning and not self._last.endswith("\n"):
                self._aside.write("\n")
            if self._on_terminal or reasoning:
                self._aside.write("[thinking] " if reasoning else "[answer] ")
        stream.write(printable(text) if self._on_terminal else text)
        stream.flush()
        self._reasoning, self._last = reasoning, text

    def end(self) -> None:
        """See ReplyView."""
        if self._reasoning and self._aside is not self._stream:
            self._aside.write("\n")
            self._aside.flush()
        self._stream.write("\n")
        self._stream.flush()


class MarkdownView:
    """Markdown on a terminal; what is finished is written for good, the block under way is rewritten in place."""

    def __init__(
        self, stream: TextIO, *, color: bool, clock: Callable[[], float] = time.monotonic,
        size: Callable[[], tuple[int, int]] = shutil.get_terminal_size,
    ) -> None:  # fmt: skip
        self._live = LiveRows(stream, size)
        self._clock, self._size, self._color = clock, size, color
        self._text, self._reasoning = "", False
        self._follows: bool | None = None  # whether the block before this one is reasoning; None: there is none
        self._next_s = 0.0

    def add(self, text: str, *, reasoning: bool = False) -> None:
        """See ReplyView."""
        if text and reasoning != self._reasoning:
            self._draw(whole=True)
            self._reasoning = reasoning
        self._text += text
        begin = self._clock()
        if text and begin >= self._next_s:
            self._draw(whole=False)
            end = self._clock()
            self._next_s = end + max(_SHOW_EVERY_S, (end - begin) / _DRAWING_SHARE)

    def end(self) -> None:
        """See ReplyView."""
        self._draw(whole=True)
        self._live.end()

    def _draw(self, *, whole: bool) -> None:
        """`whole`: no more comes of this text."""
        renderer = self._renderer()
        if self._reasoning:
            cut = len(self._text) if whole else self._text.rfind("\n\n") + 1
            final, rest = renderer.aside(self._text[:cut]), renderer.aside(self._text[cut:])
        else:
            cut = len(self._text) if whole else finished_length(self._text)
            final, rest = renderer.markdown(self._text[:cut]), renderer.markdown(mended(self._text[cut:]))
        self._text = self._text[cut:]
        gap = renderer.bar if self._reasoning else ""
        if final and self._follows is not None:  # between two blocks
            final.insert(0, gap if self._follows == self._reasoning else "")
        if final:
            self._follows = self._reasoning
        if rest and self._follows is not None:
            rest.insert(0, gap if self._follows == self._reasoning else "")
        self._live.show(final + rest, num_final=len(final))

    def _renderer(self) -> RowRenderer:
        return RowRenderer(self._size()[0] - 1, color_system="standard", no_color=not self._color)


@contextmanager
def no_echo() -> Iterator[None]:
    """Within: keys pressed are not shown, as they would mix with what is rewritten; they wait for the next prompt."""
    try:
        import termios
    except ImportError:  # Windows shows keys only while a program reads them
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    quiet = termios.tcgetattr(keyboard)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
