"""One open checkpoint file: positional reads, page-cache-free where the system allows, and a watch for replacement."""

from __future__ import annotations

import os
import threading
from io import FileIO
from pathlib import Path

from offmoe.base.errors import CheckpointChangedError, CheckpointError, DiskReadError, ModelNotFoundError

# O_DIRECT wants file offset, length and address aligned to the logical block; 4096 satisfies every common drive.
DIRECT_ALIGN_BYTES = 4096


class ShardFile:
    """A file held open from index to last read, so that header and data are of the same file.

    `read_into` may be called from several threads at once. Every read is followed by a look at the path: when the
    file there is no longer the one that was opened, or was written since, CheckpointChangedError is raised.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` for buffered reads. Raises ModelNotFoundError or CheckpointError naming the file."""
        self.path = path
        self.name = path.name
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except FileNotFoundError:
            raise ModelNotFoundError(f"{path} does not exist; download the checkpoint again") from None
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}; check the permissions") from None
        self._lock = threading.Lock()
        self._direct: FileIO | None = None
        status = os.fstat(self._file.fileno())
        self.num_bytes = status.st_size
        self._identity = (status.st_ino, status.st_size, status.st_mtime_ns)

    def __repr__(self) -> str:
        return f"<ShardFile {self.name} [{self.num_bytes} bytes{', direct' if self._direct is not None else ''}]>"

    @property
    def raw(self) -> object:
        """The unbuffered file object, for the header reader."""
        return self._file

    def open_direct(self) -> bool:
        """Open a second handle that bypasses the page cache; False where the system or the file system has none."""
        if self._direct is not None:
            return True
        flag = getattr(os, "O_DIRECT", None)
        if flag is None or not hasattr(os, "preadv"):
            return False
        try:
            self._direct = FileIO(self.path, opener=lambda path, flags: os.open(path, flags | flag))
        except OSError:
            return False
        status = os.fstat(self._direct.fileno())
        if (status.st_ino, status.st_size, status.st_mtime_ns) != self._identity:
            raise self._changed()
        return True

    def read_into(self, view: memoryview, start: int, *, need_bytes: int, direct: bool = False) -> None:
        """Fill `view` from byte `start`; at least `need_bytes` must arrive (a direct read may pass the end of file).

        With `direct`, start, length and address must be multiples of DIRECT_ALIGN_BYTES and `open_direct` must have
        succeeded. Raises DiskReadError or CheckpointChangedError.
        """
        done = 0
        while done < len(view):
            try:
                count = self._read_once(view[done:], start + done, direct=direct)
            except OSError as error:
                raise DiskReadError(
                    f"reading {self.path} at byte {start + done} failed: {error.strerror}; check the drive"
                ) from None
            if count == 0:
                break
            done += count
            if direct and done % DIRECT_ALIGN_BYTES:
                break  # the end of the file: the next direct read would start unaligned
        self.check_unchanged()
        if done < need_bytes:
            raise DiskReadError(
                f"{self.path} ended {need_bytes - done} bytes early at byte {start + done}; download it again"
            )

    def _read_once(self, view: memoryview, start: int, *, direct: bool) -> int:
        if direct:
            assert self._direct is not None, "open_direct() comes first"
            return os.preadv(self._direct.fileno(), [view], start)
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], start)
        with self._lock:  # no positional read on this system: the file has one position
            self._file.seek(start)
            return self._file.readinto(view) or 0

    def check_unchanged(self) -> None:
        """Raise CheckpointChangedError when the path no longer holds the bytes that were indexed."""
        try:
            status = self.path.stat()
        except OSError:
            raise self._changed() from None
        if os.name == "nt":  # os.stat and os.fstat disagree on st_ino for some file systems there
            same = (status.st_size, status.st_mtime_ns) == self._identity[1:]
        else:
            same = (status.st_ino, status.st_size, status.st_mtime_ns) == self._identity
        if not same:
            raise self._changed()

    def _changed(self) -> CheckpointChangedError:
        return CheckpointChangedError(f"{self.path} was replaced or removed while in use; load the model again")

    def close(self) -> None:
        """Close both handles; reads afterwards fail."""
        self._file.close()
        if self._direct is not None:
            self._direct.close()
            self._direct = None
