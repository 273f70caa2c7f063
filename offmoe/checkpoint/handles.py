"""Open files, fewer than a process may have: those that were not read for the longest time are closed, and reopened.

A checkpoint may have 200 shards, each opened twice (once for direct reads), where `ulimit -n` allows 256 files or less.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

# Open files of all checkpoints together: at most this, and at most half of what the process may have, less some.
MOST_OPEN, SPARED, FEWEST_OPEN = 512, 32, 8


@dataclass
class _Handle:
    number: int
    users: int = 0
    is_forgotten: bool = False


class Handles:
    """File numbers by key. Threads may borrow at once; one that is borrowed is not closed."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: OrderedDict[Hashable, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._forgotten: deque[Hashable] = deque()  # to be dropped by whoever holds the lock

    def __repr__(self) -> str:
        return f"<Handles [{len(self._open)} open, {self._most} at most]>"

    @contextmanager
    def borrow(self, key: Hashable, opener: Callable[[], int]) -> Iterator[int]:
        """The file number of `key`, from `opener` where it is not open. Within, it stays open."""
        with self._lock:
            self._drop_forgotten()
            handle = self._find(key, opener)
            handle.users += 1
        try:
            yield handle.number
        finally:
            with self._lock:
                handle.users -= 1
                if handle.is_forgotten and not handle.users:
                    os.close(handle.number)
                self._drop_forgotten()

    def forget(self, key: Hashable) -> None:
        """Close the file of `key`, when its last borrower has given it back."""
        self._forgotten.append(key)
        with self._lock:
            self._drop_forgotten()

    def forget_unlocked(self, key: Hashable) -> None:
        """Forget a handle from a finalizer. These run between any two lines, also of the thread that holds the lock,
        which then does it.
        """
        self._forgotten.append(key)
        if self._lock.acquire(blocking=False):
            try:
                self._drop_forgotten()
            finally:
                self._lock.release()

    def _drop_forgotten(self) -> None:
        while self._forgotten:
            handle = self._open.pop(self._forgotten.popleft(), None)
            if handle is not None:
                self._drop(handle)

    def _find(self, key: Hashable, opener: Callable[[], int]) -> _Handle:
        handle = self._open.get(key)
        if handle is None:
            self._close_idle(self._most - 1)
            try:
                number = opener()
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE}:
                    raise
                self._close_idle(0)
                number = opener()
            handle = self._open[key] = _Handle(number)
        self._open.move_to_end(key)
        return handle

    def _close_idle(self, most: int) -> None:
        """Close files that nobody uses, the longest unused first, until `most` are open."""
        for key in [key for key, handle in self._open.items() if not handle.users][: max(0, len(self._open) - most)]:
            self._drop(self._open.pop(key))

    @staticmethod
    def _drop(handle: _Handle) -> None:
        handle.is_forgotten = True
        if not handle.users:
            os.close(handle.number)


@cache
def shared_handles() -> Handles:
    """Handles that all checkpoints of this process share."""
    return Handles(_most_open())


def _most_open() -> int:
    try:
        import resource
    except ImportError:  # Windows: 512 of the C library, 8,192 at most
        return MOST_OPEN // 2
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return MOST_OPEN
    return max(FEWEST_OPEN, min(MOST_OPEN, allowed // 2 - SPARED))
