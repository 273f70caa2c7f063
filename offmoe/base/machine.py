"""What this machine and this process have: memory free, memory used, page size of direct reads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
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


def give_back_freed_memory() -> None:
    """Hand memory that was freed back to the system, where the C library keeps it: glibc keeps pieces up to 32 MiB.

    After resident weights are read that is as much again as their smaller tensors (129 MiB of OLMoE's two layers).
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to ask
            ctypes.CDLL(None).malloc_trim(0)


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


def free_vram_bytes() -> int | None:
    """Free memory of the first NVIDIA GPU, as its driver's own tool says; None where there is none. No torch."""
    return next(iter(_smi("memory.free")), None)


def _smi(what: str) -> list[int]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) << 20 for line in found.split() if line.isdigit()]


def num_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_cache_bytes() -> int:
    """The processor's largest cache; 8 MiB where the system does not say."""
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding="ascii").strip()
            largest = max(largest, int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    return largest or 8 << 20
