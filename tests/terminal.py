"""A program in a pseudo-terminal of its own, as a person would sit before it."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType

TIMEOUT_S = 20
CTRL_C, CTRL_D = "\x03", "\x04"
# Makes the terminal the program's own, so that Ctrl-C in it is a signal.
_LAUNCH = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """Keys go in by `send`; `expect` waits for what the screen shows after what was expected before."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self._keyboard, screen = os.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *command], stdin=screen, stdout=screen, stderr=screen, env=env
        )
        os.close(screen)
        self._shown, self._seen = "", 0

    def send(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def expect(self, pattern: str) -> str:
        """The text up to and including the first match of `pattern` beyond the last one."""
        deadline = time.monotonic() + TIMEOUT_S
        while (match := re.search(pattern, self._shown[self._seen :])) is None:
            assert self._read(deadline), f"no {pattern!r} in {self._shown[self._seen :]!r} of {self._shown!r}"
        self._seen += match.end()
        return match.string[: match.end()]

    def wait(self) -> int:
        """The exit code, once everything was shown."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._read(deadline):
            pass
        return self._process.wait(TIMEOUT_S)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def shown(self) -> str:
        return self._shown

    def _read(self, deadline: float) -> bool:
        """Take in what there is, waiting for it; False at the end of the program or of the time."""
        ready, _, _ = select.select([self._keyboard], [], [], max(0.0, deadline - time.monotonic()))
        if not ready or time.monotonic() > deadline:
            return False
        try:
            data = os.read(self._keyboard, 1 << 16)
        except OSError:  # Linux's way to say that nobody holds the other end
            return False
        self._shown += data.decode(errors="replace")
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._keyboard)
