"""What this machine and this process have: memory free, memory used, page size of direct reads."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import psutil

_CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def rss_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, as the operating system recorded it."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    with contextlib.suppress(OSError, StopIteration):  # Linux. getrusage's peak starts at that of the parent process.
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def available_ram_bytes() -> int:
    """Memory that can be taken without swapping: the system's, or the container's where that is less."""
    available = int(psutil.virtual_memory().available)
    for limit_file, usage_file in _cgroup_files():
        try:
            limit, usage = limit_file.read_text().strip(), usage_file.read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and usage.isdigit():
            available = min(available, max(0, int(limit) - int(usage)))
    return available


def _cgroup_files() -> list[tuple[Path, Path]]:
    """Limit and usage files of the control group that this process is in, innermost first."""
    found = list(_CGROUP_FILES)
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "memory":
            folder = Path("/sys/fs/cgroup/memory" + path)
            found.insert(0, (folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes"))
        elif controllers == "":
            folder = Path("/sys/fs/cgroup" + path)
            found.insert(0, (folder / "memory.max", folder / "memory.current"))
    return found


def num_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
