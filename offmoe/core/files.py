"""Files that offmoe writes for a user, and files that a user names for it to read.

A written file is whole or not there: it grows beside its place and takes it at the end, where links lead, with the
permissions of the file before. A file that offmoe did not write is replaced only where the user says so. A device, a
pipe or a standard stream is written to as it is, and a drive is refused. What is read has a bounded size, since a
device may never end.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from offmoe.core.errors import OutputError, UsageError

PARTIAL_SUFFIX = ".partial"
MAX_TEXT_BYTES = 64 << 20
# Names of open files: what is behind them is written to, not replaced.
_OPEN_FILES = ("/dev/", "/proc/")


def check_output(path: Path, what: str, is_ours: Callable[[Path], bool], *, overwrite: bool = False) -> None:
    """Raise UsageError where `path` is a file that `is_ours` denies, and OutputError where it can be none.

    `what` names the kind of file: "a trace". A file without a byte holds nothing to lose.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):  # nothing is there; what cannot be made is told when it is made
        return
    except OSError as error:
        raise _explained(path, error) from None
    if stat.S_ISDIR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a drive"
        raise OutputError(f"{path} cannot be written: it is {kind}; choose another place")
    if stat.S_ISREG(status.st_mode) and status.st_size and not overwrite and not is_ours(path):
        raise UsageError(f"{path} exists and is no {what.removeprefix('a ')}; choose another name")


class PendingFile:
    """A file that is being written. `commit` puts it in its place, `discard` takes it away.

    `is_special`: what is there is no file of a folder, and gets the bytes as they come.
    """

    def __init__(self, path: Path, *, partial_name: str | None = None) -> None:
        """Raises OSError. `partial_name`: of the file beside the place, instead of one with the process number."""
        real = Path(os.path.realpath(path))
        self.is_special = _is_special(path)
        self.path = path if self.is_special else real
        name = partial_name or f".{real.name}.{os.getpid()}{PARTIAL_SUFFIX}"
        self.partial = path if self.is_special else real.with_name(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        flags |= 0 if self.is_special else getattr(os, "O_NOFOLLOW", 0)
        self.file: BinaryIO = open(  # noqa: SIM115  (open until commit or discard)
            self.partial, "wb", opener=lambda name, _: os.open(name, flags, 0o666)
        )

    def commit(self) -> None:
        """Close the file and put it in its place. Raises OSError."""
        self.file.close()
        if not self.is_special:
            with contextlib.suppress(OSError):
                self.partial.chmod(stat.S_IMODE(self.path.stat().st_mode))
            self.partial.replace(self.path)

    def discard(self) -> None:
        """Close the file and take it away."""
        with contextlib.suppress(OSError):
            self.file.close()
        if not self.is_special:
            with contextlib.suppress(OSError):
                self.partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write all of a file or none of it. Raises OSError."""
    pending = PendingFile(path)
    try:
        pending.file.write(data)
        pending.commit()
    except BaseException:
        pending.discard()
        raise


def read_bounded(path: Path, what: str, most_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a file that a user named, a pipe's too. Raises UsageError, which begins with `what`: "--ids"."""
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise UsageError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    if len(data) > most_bytes:
        raise UsageError(f"{what} {path} has more than {most_bytes >> 20} MiB; it cannot be what is asked for")
    return data


def read_text_bounded(path: Path, what: str, most_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a file as `read_bounded` does, as UTF-8 text with newlines as line ends. Raises UsageError."""
    try:
        text = read_bounded(path, what, most_bytes).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path} is no UTF-8 text (byte {error.start}); convert it first") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def begins_with(path: Path, magic: bytes) -> bool:
    """True for a file whose first bytes are `magic`."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(magic)) == magic
    return False


def _is_special(path: Path) -> bool:
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False
    return not is_regular or str(path.absolute()).startswith(_OPEN_FILES)


def _explained(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror or error}; choose another place")
