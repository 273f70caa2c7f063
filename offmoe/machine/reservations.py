"""Memory that engines of this user will still take, told to those that load beside them.

An engine's expert slots fill while it runs, so what the system calls free just after a load is spoken for already. Each
engine therefore keeps a small file in a folder that all processes of the user share, from before its weights are read
until it is closed: its process and the bytes that the process is to grow by. A file counts while that process lives,
which is told by number and start time; files of a container that shares the folder and not the numbers are passed
over. What cannot be written or read is no error: then nobody is told.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from offmoe.core.folders import NO_HOME

FOLDER_VARIABLE = "OFFMOE_RUN"
MAX_RECORD_BYTES, MAX_RECORDS = 1 << 12, 4096
# Between two looks at free memory lie milliseconds; who waits longer goes on without the lock.
LOCK_WAIT_S = 2.0
_serials = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Outstanding:
    """Bytes that the engines of process `pid` have planned and not taken yet."""

    pid: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A file's content; `is_here`: its process numbers are those that this process sees."""

    pid: int
    started_s: float
    is_here: bool
    baseline_bytes: int
    planned_bytes: int


def run_folder() -> Path:
    """OFFMOE_RUN, or a folder of the user's own among the temporary ones."""
    named = os.environ.get(FOLDER_VARIABLE, "")
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    try:
        return Path(named or tempfile.gettempdir()) / ("" if named else f"offmoe-{user}")
    except OSError:  # a system on which nothing can be written
        return NO_HOME / "offmoe"


class Reservation:
    """Bytes that an engine of this process is to grow by from `baseline_bytes`; withdrawn when closed or collected."""

    def __init__(self, baseline_bytes: int, folder: Path | None = None) -> None:
        self.path = (folder or run_folder()) / f"{os.getpid()}-{next(_serials)}.json"
        self._baseline_bytes = baseline_bytes
        self._withdraw = weakref.finalize(self, _remove, self.path, os.getpid())

    def reserve(self, planned_bytes: int) -> None:
        """Tell others of `planned_bytes`, instead of what was told before."""
        record = {
            "pid": os.getpid(), "started_s": _started_s(os.getpid()), "namespace": _namespace(),
            "baseline_bytes": self._baseline_bytes, "planned_bytes": planned_bytes,
        }  # fmt: skip
        partial = self.path.with_suffix(".partial")
        with contextlib.suppress(OSError):
            _make_private(self.path.parent)
            partial.write_text(json.dumps(record), encoding="ascii")
            partial.replace(self.path)

    def close(self) -> None:
        """Withdraw it."""
        self._withdraw()


def outstanding(folder: Path | None = None) -> list[Outstanding]:
    """Memory that living processes have planned and not taken yet. Removes the files of processes that ended."""
    folder = folder or run_folder()
    planned: dict[int, list[tuple[int, int]]] = {}
    with contextlib.suppress(OSError):
        if _is_private(folder):
            for path in itertools.islice(sorted(folder.glob("*.json")), MAX_RECORDS):
                record = _read(path)
                if record is None or (record.is_here and _started_s(record.pid) != record.started_s):
                    path.unlink(missing_ok=True)
                elif record.is_here:
                    planned.setdefault(record.pid, []).append((record.baseline_bytes, record.planned_bytes))
    found = []
    for pid, plans in planned.items():
        with contextlib.suppress(psutil.Error):
            grown = int(psutil.Process(pid).memory_info().rss) - min(baseline for baseline, _ in plans)
            found.append(Outstanding(pid=pid, num_bytes=max(0, sum(num for _, num in plans) - max(0, grown))))
    return found


@contextmanager
def one_at_a_time(folder: Path | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Keep the user's other processes from reserving memory meanwhile. Goes on unguarded after LOCK_WAIT_S."""
    folder = folder or run_folder()
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            _make_private(folder)
            file = held.enter_context((folder / "lock").open("ab"))
            end = clock() + LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if clock() > end:
                        break
                    time.sleep(0.01)
        yield


def _read(path: Path) -> _Record | None:
    """None for a file that is no record."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_RECORD_BYTES))
        return _Record(
            pid=int(found["pid"]), started_s=float(found["started_s"]), is_here=found["namespace"] == _namespace(),
            baseline_bytes=int(found["baseline_bytes"]), planned_bytes=max(0, int(found["planned_bytes"])),
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _namespace() -> str:
    """The space that process numbers are of: a container has its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _started_s(pid: int) -> float | None:
    """Start time of a process; None without a process of that number."""
    try:
        return round(psutil.Process(pid).create_time(), 2)
    except (psutil.Error, OverflowError, ValueError):
        return None


def _make_private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_private(folder):
        raise PermissionError(f"{folder} belongs to somebody else")


def _is_private(folder: Path) -> bool:
    """A folder, no link, of this user alone: another user could plant records in it."""
    status = folder.lstat()
    is_own = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
    return stat.S_ISDIR(status.st_mode) and is_own


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has a copy of the object, and not the engine
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
