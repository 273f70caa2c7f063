"""Run a command, measure it, and where asked hold all it uses, page cache included, under a memory cap.

The cap is a cgroup: version 1's memory controller where it is mounted, else version 2. Both count the page cache of
files the command reads, so a model that is mapped or read through the cache cannot use more RAM than the cap; pages
that were in the cache before are charged to whoever brought them in, hence they are dropped first. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchlib.errors import ScriptError

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
BLOCK_BYTES = 512  # unit of ru_inblock
REMOVE_ATTEMPTS = 200  # 10 s: a killed process leaves its group a moment after the signal


@dataclass(frozen=True, kw_only=True)
class Layout:
    """File names of one cgroup version; `no_swap` is a file and what to write so that the cap is on all memory."""

    version: int
    limit: str
    peak: str
    failures: str
    no_swap: tuple[str, str]


V1 = Layout(
    version=1, limit="memory.limit_in_bytes", peak="memory.max_usage_in_bytes", failures="memory.failcnt",
    no_swap=("memory.swappiness", "0"),
)  # fmt: skip
V2 = Layout(
    version=2, limit="memory.max", peak="memory.peak", failures="memory.events", no_swap=("memory.swap.max", "0")
)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a command printed and used. Bytes of RSS count mapped file pages; `cgroup_*` are None without a cap."""

    returncode: int
    stdout: str
    elapsed_s: float
    peak_rss_bytes: int
    disk_read_bytes: int
    cgroup_peak_bytes: int | None = None
    cgroup_limit_hits: int | None = None

    @property
    def killed(self) -> bool:
        """Whether the kernel ended it, which under a cap means out of memory."""
        return self.returncode == -signal.SIGKILL


class MemoryGroup:
    """One cgroup directory with a memory limit."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self._layout = layout

    @property
    def processes_file(self) -> Path:
        """A process joins by writing its number here."""
        return self.path / "cgroup.procs"

    def peak_bytes(self) -> int | None:
        """Most bytes ever charged; None where the kernel does not tell."""
        path = self.path / self._layout.peak
        return int(path.read_text()) if path.exists() else None

    def limit_hits(self) -> int:
        """How often an allocation met the limit (mostly the page cache, which then gives pages back)."""
        text = (self.path / self._layout.failures).read_text()
        if self._layout.version == 1:
            return int(text)
        return int(dict(line.split() for line in text.splitlines())["max"])


@contextlib.contextmanager
def memory_group(cap_bytes: int) -> Iterator[MemoryGroup]:
    """A fresh group limited to `cap_bytes`; at the end what still runs in it is killed and the group is removed.

    Raises `ScriptError` where the group cannot be made.
    """
    parent, layout = find_controller()
    path = parent / f"offmoe-bench-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        raise ScriptError(f"--cap needs root, and a writable cgroup at {parent}: {error.strerror}") from error
    try:
        (path / layout.limit).write_text(str(cap_bytes))
        swap_file, value = layout.no_swap
        if (path / swap_file).exists():
            (path / swap_file).write_text(value)
        yield MemoryGroup(path, layout)
    finally:
        _remove(path)


def find_controller() -> tuple[Path, Layout]:
    """The memory controller's directory and its version. Raises `ScriptError` where there is none."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for _, mount_point, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(mount_point), V1
    for _, mount_point, kind, *_ in mounts:
        control = Path(mount_point) / "cgroup.subtree_control"
        if kind == "cgroup2" and "memory" in (Path(mount_point) / "cgroup.controllers").read_text().split():
            with contextlib.suppress(PermissionError):  # mkdir tells the user
                control.write_text("+memory")
            return Path(mount_point), V2
    raise ScriptError("--cap needs a cgroup memory controller, and none is mounted; run without --cap")


def _remove(path: Path) -> None:
    """Kill what is left in the group and remove it."""
    for attempt in range(REMOVE_ATTEMPTS):
        for pid in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            path.rmdir()
            return
        except OSError:
            if attempt + 1 == REMOVE_ATTEMPTS:
                raise
            time.sleep(0.05)


def drop_page_cache() -> None:
    """Write dirty pages out and empty the page cache. Raises `ScriptError` without root."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError as error:
        raise ScriptError(f"--cap empties the page cache first, which needs root: {error.strerror}") from error


def run_measured(
    command: Sequence[str], *, cap_bytes: int | None, cwd: Path, environment: Mapping[str, str]
) -> Finished:
    """Run `command` to its end; its stderr goes to ours. With `cap_bytes`, in a capped group with a cold page cache."""
    if cap_bytes is None:
        return _run(command, cwd=cwd, environment=environment)
    drop_page_cache()
    with memory_group(cap_bytes) as group:
        # The shell joins the group and becomes the command, so that nothing of it is ever charged elsewhere.
        join = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.processes_file), *command]
        return _run(join, cwd=cwd, environment=environment, group=group)


def _run(
    command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], group: MemoryGroup | None = None
) -> Finished:
    """Run, wait, and read the counters while the group still exists."""
    started_s = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=cwd, env=environment)
    try:
        assert process.stdout is not None, "stdout is a pipe"
        stdout = process.stdout.read()
        # wait4 and not wait: it tells this child's own peak, where getrusage tells the largest of all children.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    return Finished(
        returncode=process.returncode,
        stdout=stdout,
        elapsed_s=time.monotonic() - started_s,
        peak_rss_bytes=usage.ru_maxrss * 1024,
        disk_read_bytes=usage.ru_inblock * BLOCK_BYTES,
        cgroup_peak_bytes=group.peak_bytes() if group else None,
        cgroup_limit_hits=group.limit_hits() if group else None,
    )
