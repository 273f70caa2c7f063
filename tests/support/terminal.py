"""The person's side of a pseudo-terminal: keys in, and what the screen shows."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import termios
import time
from types import TracebackType

from patience import PATIENCE_S

CTRL_C, CTRL_D = "\x03", "\x04"


class Screened:
    """Keys go in by `send`; `expect` waits for what the screen shows after what was expected before."""

    def __init__(self, keyboard: int, columns: int, rows: int) -> None:
        """`keyboard`: the controlling end of a pseudo-terminal, closed with this."""
        self._keyboard = keyboard
        self._shown, self._seen = "", 0
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def expect(self, pattern: str) -> str:
        """The text up to and including the first match of `pattern` beyond the last one."""
        deadline = time.monotonic() + PATIENCE_S
        while (match := re.search(pattern, self._shown[self._seen :])) is None:
            assert self._read(deadline), f"no {pattern!r} in {self._shown[self._seen :]!r} of {self._shown!r}"
        self._seen += match.end()
        return match.string[: match.end()]

    def drain(self) -> None:
        """Until nobody holds the other end."""
        deadline = time.monotonic() + PATIENCE_S
        while self._read(deadline):
            pass

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

    def __enter__(self) -> Screened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._keyboard)
