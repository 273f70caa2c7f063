"""Threads that run torch's compiler beside a program that may close its engine, or end, at any time.

The interpreter ends daemon threads wherever they next ask for its lock; with torch's C++ frames below, that calls
std::terminate and the process aborts after its work was done (https://github.com/pytorch/pytorch/issues/38228). A
thread that goes on after its engine was closed keeps the weights that it reads. Dynamo cannot be told to stop, so it is
interrupted as Ctrl-C interrupts it: by an exception that is raised in its thread, between two lines of Python.

An exception that was sent must be raised: until then the interpreter looks for it at every call, in all threads, and
Python 3.11 then calls no function ever again under `sys.settrace` or `sys.setprofile`. Taking it back (by sending none)
leaves the interpreter looking for good.

With torch 2.11 an exception that was raised in Dynamo so ended in a part of torch's C++ code that lets none through,
and aborted the process (once of once; benchmarks/2026-11-30-versions.md). Before 2.13, where it was not seen, a thread
is waited for and not interrupted.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Between two interruptions of one thread. Dynamo's calls into C++ take less; torch's own clean-up may swallow one.
_ASK_EVERY_S = 0.5
# Whether torch lets exceptions through that are raised in its compiler from outside.
MAY_RAISE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
# How long `close` waits. Inductor's own compilers (g++, Triton) run for minutes and cannot be interrupted.
PATIENCE_S = 10.0


class Interrupted(BaseException):
    """Raised in a compiling thread that was told to end. No `Exception`, so that torch does not fall back from it."""


class CompileThread(threading.Thread):
    """A daemon thread that compiles. The interpreter waits for it before it ends daemon threads.

    `work` is dropped when it has ended: a thread object that somebody keeps keeps no model.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(name="offmoe-compile", daemon=True)
        self._work: Callable[[], Any] | None = work
        self._gate = threading.Lock()  # nobody is interrupted while it leaves the window
        self._is_open = self._was_asked = False

    def start(self) -> None:
        """Begin. Raises RuntimeError where no thread can be started."""
        _threads.add(self)
        super().start()

    def run(self) -> None:
        """Do the work; an interruption ends it."""
        try:
            assert self._work is not None
            self._work()
        except Interrupted:  # maybe before the window was closed; the next one comes in half a second
            self._is_open = False
        finally:
            self._work = None

    @contextmanager
    def window(self) -> Iterator[None]:
        """Open a window in which the thread may be interrupted: torch's code, none of ours."""
        with self._gate:
            self._is_open = True
        try:
            yield
        finally:
            try:
                with self._gate:
                    self._is_open = False
                for _ in range(2 if self._was_asked else 0):
                    pass  # an interruption that was sent and not raised yet is raised by this jump back
            except Interrupted:
                self._is_open = False

    def interrupt(self, patience_s: float = PATIENCE_S) -> bool:
        """Ask the thread to end, where torch can bear it, and wait. Returns whether it has ended within the time."""
        waited_s = 0.0
        while self.is_alive() and waited_s < patience_s:
            with self._gate:
                if self._is_open and MAY_RAISE:
                    self._was_asked = True
                    _raise_in(self, Interrupted)
            self.join(_ASK_EVERY_S)
            waited_s += _ASK_EVERY_S
        return not self.is_alive()


_threads: weakref.WeakSet[CompileThread] = weakref.WeakSet()


@contextmanager
def interruptible() -> Iterator[None]:
    """Allow the calling thread to be interrupted, where it is one that compiles in the background."""
    thread = threading.current_thread()
    if not isinstance(thread, CompileThread):
        yield
        return
    with thread.window():
        yield


def is_compiling() -> bool:
    """True while any engine of this process compiles in the background."""
    return any(thread.is_alive() for thread in list(_threads))


def _raise_in(thread: threading.Thread, kind: type[BaseException]) -> None:
    """Have `kind` raised in `thread` before its next line."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(kind))


@atexit.register
def _end_all() -> None:
    """Ask each thread to end, and wait for it however long it takes, before the interpreter ends daemon threads."""
    for thread in list(_threads):
        if not thread.interrupt():
            thread.join()
