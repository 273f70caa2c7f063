"""Linux control groups, versions 1 and 2: the memory and the processors that the groups of a process allow it.

A process is bound by its own group and by every group above it, as far up as this process can see. Page cache counts
as used memory in a group, and the kernel drops it when the group needs room. So what can be had is limit - usage +
(active_file + inactive_file) - what is dirty, being written or mapped. (Sources: cgroup-v2.rst and
cgroup-v1/memory.rst in the kernel's documentation; /proc/meminfo's MemAvailable is the same sum for the whole machine.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/self")
# A v1 limit that is none: the largest multiple of a page below 2**63.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True, kw_only=True)
class MemoryGroup:
    """A group with a limit: `path` in its hierarchy, bytes of the limit, and bytes that can be had within it."""

    path: str
    limit_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class _Mount:
    """A mounted hierarchy: `controllers` is empty for version 2. `root` is the group that is seen at `folder`."""

    controllers: frozenset[str]
    root: str
    folder: Path


def memory_groups(proc: Path = PROC) -> list[MemoryGroup]:
    """The groups with a memory limit that the process `proc` (a folder of /proc) is in, innermost first."""
    found = []
    for mount, path in _memberships(proc, "memory"):
        for idx, (group, folder) in enumerate(_upwards(mount, path)):
            limits = _limits_v1(folder, is_own=idx == 0) if mount.controllers else _limits_v2(folder)
            usage = _number(folder / ("memory.usage_in_bytes" if mount.controllers else "memory.current"))
            if limits and usage is not None:
                limit = min(limits)
                free = limit - usage + _droppable_bytes(folder, "total_" if mount.controllers else "")
                found.append(MemoryGroup(path=group, limit_bytes=limit, available_bytes=max(0, min(free, limit))))
    return found


def is_in_group(path: str, proc: Path) -> bool:
    """True when the process `proc` is in the memory group `path`, or in one below it."""
    return any(path in {"/", own} or own.startswith(path + "/") for _, own in _memberships(proc, "memory", PROC))


def processor_quota(proc: Path = PROC) -> float | None:
    """Processors' worth of time that the groups allow, the smallest of them; None where there is no quota."""
    quotas = []
    for mount, path in _memberships(proc, "cpu"):
        for _, folder in _upwards(mount, path):
            if mount.controllers:
                quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
            else:
                words = _text(folder / "cpu.max").split()
                quota, period = (int(w) if w.isdigit() else None for w in words) if len(words) == 2 else (None, None)
            if quota and period:
                quotas.append(quota / period)
    return min(quotas, default=None)


def _memberships(proc: Path, controller: str, mounts: Path | None = None) -> Iterator[tuple[_Mount, str]]:
    """The hierarchies that may have `controller`, and the group of the process in each."""
    mounted = _mounts(proc if mounts is None else mounts)
    for line in _text(proc / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        controllers = frozenset(names.split(",")) if names else frozenset[str]()
        if controllers and controller not in controllers:
            continue
        for mount in mounted:
            if (controller in mount.controllers) if controllers else not mount.controllers:
                yield mount, _below(mount, path)


def _mounts(proc: Path) -> list[_Mount]:
    """The control group hierarchies in `proc`/mountinfo (proc_pid_mountinfo(5))."""
    found = []
    for line in _text(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or not kind or kind[0] not in {"cgroup", "cgroup2"}:
            continue
        options = frozenset(kind[-1].split(",")) if kind[0] == "cgroup" else frozenset[str]()
        found.append(_Mount(options, fields[3], Path(fields[4].replace("\\040", " "))))
    return found


def _below(mount: _Mount, path: str) -> str:
    """The group's path from the mount's root: a container may be shown its own group there, and its full path."""
    if mount.root != "/" and (path == mount.root or path.startswith(mount.root + "/")):
        path = path[len(mount.root) :]
    return "/" + "/".join(part for part in path.split("/") if part and part != "..")


def _upwards(mount: _Mount, path: str) -> Iterator[tuple[str, Path]]:
    """The group `path` and those above it: name and folder, as far as the mount shows them."""
    parts = path.split("/")[1:] if path != "/" else []
    for end in range(len(parts), -1, -1):
        folder = mount.folder.joinpath(*parts[:end])
        if folder.is_dir():
            yield "/" + "/".join(parts[:end]), folder


def _limits_v1(folder: Path, *, is_own: bool) -> list[int]:
    """Limits of a version 1 group, with that of the groups above it which a container does not see."""
    if not is_own and _number(folder / "memory.use_hierarchy") == 0:
        return []  # what is below it is not counted in it
    limits = [_number(folder / "memory.limit_in_bytes"), _statistics(folder).get("hierarchical_memory_limit")]
    return [limit for limit in limits if limit is not None and limit < _NO_LIMIT]


def _limits_v2(folder: Path) -> list[int]:
    """`memory.max` kills, and above `memory.high` the kernel slows a group down to a crawl."""
    limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
    return [limit for limit in limits if limit is not None]


def _droppable_bytes(folder: Path, prefix: str) -> int:
    """Page cache that the kernel can drop at once: clean, and mapped by nobody (those pages would come back)."""
    numbers = _statistics(folder)
    cached = sum(numbers.get(prefix + name, 0) for name in ("active_file", "inactive_file"))
    if prefix:
        busy = ("total_mapped_file", "total_dirty", "total_writeback")
    else:
        busy = ("file_mapped", "file_dirty", "file_writeback")
    return max(0, cached - sum(numbers.get(name, 0) for name in busy))


def _statistics(folder: Path) -> dict[str, int]:
    pairs = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
