"""Memory of this machine and this process: free, memory used, page size of direct reads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from offmoe.machine.control_groups import is_in_group, memory_groups, processor_quota
from offmoe.machine.reservations import outstanding


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
    """Memory that can be taken without swapping, by the machine and by every control group above this process.

    What other engines have planned and not taken yet is not free: those of this process, and of the user's others.
    """
    planned = {claim.pid: claim.num_bytes for claim in outstanding()}
    bounds = [int(psutil.virtual_memory().available) - sum(planned.values())]
    for group in memory_groups():
        within = [size for pid, size in planned.items() if is_in_group(group.path, Path(f"/proc/{pid}"))]
        bounds.append(group.available_bytes - sum(within))
    return max(0, min(bounds))


def total_ram_bytes() -> int:
    """Memory of the machine, or of the smallest control group above this process, used or not."""
    return min([int(psutil.virtual_memory().total), *(group.limit_bytes for group in memory_groups())])


def free_vram_bytes() -> int | None:
    """Free memory of the first NVIDIA GPU, as its driver's own tool says; None where there is none. No torch."""
    return next(iter(_smi("memory.free")), None)


def total_vram_bytes() -> int | None:
    """All memory of the first NVIDIA GPU; None where there is none. No torch."""
    return next(iter(_smi("memory.total")), None)


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
    """Threads that can run at once: cores that this process may run on, and whole ones of a container's quota.

    With more threads than the quota pays for, the kernel stops all of them for the rest of every tenth of a second.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = processor_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_cache_bytes() -> int:
    """The processor's largest cache; 8 MiB where the system does not say."""
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding="ascii").strip()
            largest = max(largest, int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    return largest or 8 << 20
