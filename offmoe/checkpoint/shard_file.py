"""One checkpoint file: positional reads, page-cache-free where the system allows, and a watch for replacement."""

from __future__ import annotations

import errno
import io
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offmoe.checkpoint.handles import Handles, shared_handles
from offmoe.core.errors import CheckpointChangedError, DiskReadError, ModelNotFoundError

# O_DIRECT wants file offset, length and address aligned to the logical block; 4096 satisfies every common drive.
DIRECT_ALIGN_BYTES = 4096


def read_refused(path: Path, error: OSError, what: str = "read") -> DiskReadError:
    """The error for a file that the operating system refuses to open or read; its bytes may be well."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        advice = "close other files, or raise the limit (ulimit -n)"
    elif isinstance(error, PermissionError):
        advice = "check the permissions"
    else:
        advice = "check the drive"
    return DiskReadError(f"cannot {what} {path}: {error.strerror or error}; {advice}")


class ShardFile:
    """A file that is the same from index to last read. It is open while it is read, and as long as there is room.

    `read_into` may be called from several threads at once. Every read is followed by a look at the path: when the
    file there is no longer the one that was opened first, or was written since, CheckpointChangedError is raised.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` for buffered reads. Raises ModelNotFoundError or DiskReadError naming the file."""
        self.path = path
        self.name = path.name
        self._handles = handles = shared_handles()
        self._keys = keys = (object(), object())  # of the handles for buffered and direct reads
        weakref.finalize(self, _forget, handles, keys).atexit = False
        self._lock = threading.Lock()
        self._is_closed = self._is_direct = False
        self._identity: tuple[int, int, int] | None = None
        self.num_bytes = 0
        try:
            with self._handles.borrow(self._keys[0], lambda: self._open(0)) as number:
                status = os.fstat(number)
        except FileNotFoundError:
            raise ModelNotFoundError(f"{path} does not exist; download the checkpoint again") from None
        except OSError as error:
            raise read_refused(path, error, "open") from None
        self.num_bytes = status.st_size
        self._identity = _identity(status)
        self.raw = _Raw(self)

    def __repr__(self) -> str:
        return f"<ShardFile {self.name} [{self.num_bytes} bytes{', direct' if self._is_direct else ''}]>"

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise failures of reads through `raw` as DiskReadError."""
        try:
            yield
        except OSError as error:
            raise read_refused(self.path, error) from None

    def open_direct(self) -> bool:
        """Prepare reads that bypass the page cache; False where the system or the file system has none.

        One block is read so: some file systems open a file for direct reads and then refuse each of them.
        """
        if self._is_direct:
            return True
        if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
            return False
        try:
            block = mmap.mmap(-1, DIRECT_ALIGN_BYTES)
            with self._handles.borrow(self._keys[1], lambda: self._open(os.O_DIRECT)) as number:
                count = os.preadv(number, [block], 0)
        except OSError:
            self._handles.forget(self._keys[1])
            return False
        self._is_direct = count == min(DIRECT_ALIGN_BYTES, self.num_bytes)
        return self._is_direct

    def _open(self, more_flags: int) -> int:
        if self._is_closed:
            raise ValueError(f"read of the closed file {self.path}")
        number = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | more_flags)
        if self.path.is_dir():
            os.close(number)
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if self._identity is not None and _identity(os.fstat(number)) != self._identity:
            os.close(number)
            raise self._changed()
        return number

    def read_into(self, view: memoryview, start: int, *, need_bytes: int, direct: bool = False) -> None:
        """Fill `view` from byte `start`; at least `need_bytes` must arrive (a direct read may pass the end of file).

        With `direct`, start, length and address must be multiples of DIRECT_ALIGN_BYTES and `open_direct` must have
        succeeded; what a direct read leaves out or refuses after all is read through the page cache. A read that fails
        by EIO is tried once more. Raises DiskReadError or CheckpointChangedError.
        """
        done, retries = 0, 1
        while done < len(view):
            try:
                count = self._read_once(view[done:], start + done, direct=direct)
            except OSError as error:
                if direct and error.errno in _NOT_DIRECT:
                    direct = False
                    continue
                if error.errno == errno.EIO and retries:
                    retries -= 1
                    continue
                raise DiskReadError(
                    f"reading {self.path} at byte {start + done} failed: {error.strerror}; check the drive"
                ) from None
            done += count
            if direct and start + done < self.num_bytes and (not count or done % DIRECT_ALIGN_BYTES):
                direct = False  # it came short before the end of the file, and the next one would start unaligned
            elif not count or (direct and done % DIRECT_ALIGN_BYTES):
                break
        self.check_unchanged()
        if done < need_bytes:
            raise DiskReadError(
                f"{self.path} ended {need_bytes - done} bytes early at byte {start + done}; download it again"
            )

    def _read_once(self, view: memoryview, start: int, *, direct: bool) -> int:
        assert self._is_direct or not direct, "open_direct() comes first"
        flags = os.O_DIRECT if direct else 0
        with self._handles.borrow(self._keys[direct], lambda: self._open(flags)) as number:
            if hasattr(os, "preadv"):
                return os.preadv(number, [view], start)
            with self._lock:  # no positional read on this system: the file has one position
                os.lseek(number, start, os.SEEK_SET)
                data = os.read(number, len(view))
        view[: len(data)] = data
        return len(data)

    def check_unchanged(self) -> None:
        """Raise CheckpointChangedError when the path no longer holds the bytes that were indexed."""
        try:
            status = self.path.stat()
        except OSError:
            raise self._changed() from None
        if os.name == "nt":  # os.stat and os.fstat disagree on st_ino for some file systems there
            same = _identity(status)[1:] == (self._identity or ())[1:]
        else:
            same = _identity(status) == self._identity
        if not same:
            raise self._changed()

    def _changed(self) -> CheckpointChangedError:
        return CheckpointChangedError(f"{self.path} was replaced or removed while in use; load the model again")

    def close(self) -> None:
        """Close the file; reads afterwards fail."""
        self._is_closed, self._is_direct = True, False
        self.raw.close()
        _forget(self._handles, self._keys)


# What systems say to direct reads that they do not have, or not at this place.
_NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


def _forget(handles: Handles, keys: tuple[object, ...]) -> None:
    for key in keys:
        handles.forget_unlocked(key)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


class _Raw(io.RawIOBase):
    """The file as an unbuffered stream, for readers of headers."""

    def __init__(self, file: ShardFile) -> None:
        super().__init__()
        self._shard, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._shard._read_once(memoryview(buffer).cast("B"), self._position, direct=False)
        self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._shard.num_bytes}[whence]
        self._position = begin + offset
        return self._position

    def tell(self) -> int:
        return self._position
