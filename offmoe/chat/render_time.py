"""A limit to the time that a chat template computes.

The sandbox in which templates run bounds what they reach, not how long they take: two loops within each other may run
for days. Python code is broken off between two of its lines, by the interpreter's own tracing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from offmoe.core.errors import UsageError

# Templates take milliseconds, on a busy machine tenths of a second.
MOST_SECONDS = 5.0
# The name of code that Jinja compiles.
_TEMPLATE = "<template>"


class _TimeIsUpError(BaseException):
    """No `Exception`, which the template's caller takes for a refusal of the template."""


@contextmanager
def limited_time() -> Iterator[None]:
    """Context in which a template may compute for MOST_SECONDS, on the calling thread. Raises UsageError after that.

    A debugger's tracing is suspended within.
    """
    previous, end = sys.gettrace(), time.monotonic() + MOST_SECONDS

    def check(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            sys.settrace(None)
            raise _TimeIsUpError
        return check if frame.f_code.co_filename == _TEMPLATE else None

    sys.settrace(check)
    try:
        yield
    except _TimeIsUpError:
        raise UsageError(
            f"the model's chat template computes for more than {MOST_SECONDS:g} s; give the model another chat template"
        ) from None
    finally:
        sys.settrace(previous)
