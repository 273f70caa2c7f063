"""Standard streams that may be closed, full or gone, and signals that end the process in order.

A closed stream is replaced by the null device before any file is opened: a checkpoint or a trace would otherwise get
its number, and messages would be written into it. Standard error may fail, and then nobody is told. Where standard
output fails (a full disk) the command ends with one line; a reader that went away ends it without a word.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from offmoe.core.errors import OutputError


class Terminated(SystemExit):
    """SIGTERM or SIGHUP: the exit code is 128 and the signal's number, as shells have it."""


class _Output(io.FileIO):
    """Descriptor 1. The first write that fails raises OutputError; what comes after it is dropped."""

    has_failed = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data) if not self.has_failed else len(data)
        except BrokenPipeError:
            self.has_failed = True
            raise
        except OSError as error:
            self.has_failed = True
            raise OutputError(f"standard output cannot be written: {error.strerror or error}") from None


class _Messages(io.FileIO):
    """Descriptor 2. What cannot be written is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Open streams that are closed, and let the other two fail in order. Streams that a caller replaced stay."""
    _open_closed()
    if os.name == "posix":
        if sys.stdout is sys.__stdout__ and sys.stdout is not None:
            sys.stdout = _rewrapped(sys.stdout, _Output(1, "w", closefd=False), "<stdout>")
        if sys.stderr is sys.__stderr__ and sys.stderr is not None:
            sys.stderr = _rewrapped(sys.stderr, _Messages(2, "w", closefd=False), "<stderr>")


def _open_closed() -> None:
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # `open` takes the lowest number that is free, which is this one
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _rewrapped(stream: Any, raw: io.FileIO, name: str) -> io.TextIOWrapper:
    with contextlib.suppress(OSError):
        stream.flush()
    raw.name = name
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise Terminated in the main thread, once; the second one ends the process at once.

    A signal that is ignored stays ignored (nohup). Outside the main thread, where signals cannot be caught, it does
    nothing.
    """
    changed: dict[int, Any] = {}

    def end(number: int, frame: FrameType | None) -> None:
        for each in changed:
            signal.signal(each, signal.SIG_DFL)
        raise Terminated(128 + number)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                changed[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, previous in changed.items():
            signal.signal(number, previous)
