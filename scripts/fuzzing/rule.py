"""The rule that every input must keep: an OffmoeError of one line or no error, in bounded time and memory."""

from __future__ import annotations

import re
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from offmoe.core.errors import OffmoeError

# Of processor time, which a busy machine does not use up.
MOST_CPU_S = 10.0
MOST_BYTES = 1 << 30
_MOST_LETTERS = 4000


class HangError(BaseException):
    """More processor time than an input may take."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`broken`: how the rule was broken, or None. `signature`: the way through the code, for telling inputs apart."""

    broken: str | None
    signature: str
    details: str = ""


def try_input(read: Callable[[bytes, Path], None], data: bytes, folder: Path) -> Outcome:
    """Read `data` in an empty `folder`, inside the bounds. KeyboardInterrupt passes."""
    try:
        with _bounded():
            read(data, folder)
    except OffmoeError as error:
        text = str(error)
        signature = f"{type(error).__name__} {_way(error)}"
        if not text.isprintable() or not text:
            return Outcome(broken=f"a message that is not one line: {_shape(ascii(text))}", signature=signature)
        if len(text) > _MOST_LETTERS:
            return Outcome(broken=f"a message of more than {_MOST_LETTERS} letters", signature=signature)
        return Outcome(broken=None, signature=signature)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        name = f"{type(error).__module__}.{type(error).__qualname__}"
        where = _way(error).rpartition(" ")[2]
        return Outcome(
            broken=f"{name} at {where}", signature=f"{name} {_way(error)}",
            details="".join(traceback.format_exception(error))[-6000:],
        )  # fmt: skip
    return Outcome(broken=None, signature="read")


@contextmanager
def _bounded() -> Iterator[None]:
    """More memory than MOST_BYTES ends in a MemoryError, more processor time in HangError."""
    old_handler = signal.signal(signal.SIGPROF, _hang)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MOST_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, MOST_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old_handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _hang(signal_number: int, frame: FrameType | None) -> None:
    raise HangError(f"more than {MOST_CPU_S:g} s of processor time")


def _way(error: BaseException) -> str:
    """File and line of the calls below the target, the last ones of them; before them those of what caused it."""
    cause = f"{type(error.__cause__).__name__} {_way(error.__cause__)} " if error.__cause__ is not None else ""
    frames = traceback.extract_tb(error.__traceback__)
    return cause + " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-4:])


def _shape(text: str) -> str:
    """A message without its numbers."""
    return re.sub(r"\d+", "N", text)[:200]
