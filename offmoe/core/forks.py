"""Forked children: they have a copy of an engine, and none of the threads that serve it."""

from __future__ import annotations

import os

from offmoe.core.errors import EngineBusyError


def forked_error(pid: int) -> EngineBusyError:
    """The error in a forked child of the process `pid`, in which the engine was loaded."""
    return EngineBusyError(
        f"the engine was loaded in process {pid}, and this is a forked child of it ({os.getpid()}), "
        "which has none of its threads; load the model here, or start the process by spawn"
    )


class OneProcess:
    """The process that an object was made in; in a forked child of it the object is refused, not waited for."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """False in a forked child."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raise EngineBusyError in a forked child."""
        if not self.is_here:
            raise forked_error(self._pid)
