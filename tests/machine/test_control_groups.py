"""Memory and processors that control groups allow, from made trees of both versions' files."""

from __future__ import annotations

from pathlib import Path

import pytest

from offmoe.machine import memory as machine
from offmoe.machine.control_groups import is_in_group, memory_groups, processor_quota
from offmoe.machine.reservations import Outstanding

GIB = 1 << 30
V1_NO_LIMIT = "9223372036854771712"


class Tree:
    """Hierarchies below a folder, and /proc/self of a process in them."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.folder = folder / "proc", folder / "groups"
        self.proc.mkdir()
        self.mounts: list[str] = []
        self.lines: list[str] = []

    def mount(self, name: str, *, version: int, group: str, root: str = "/") -> Path:
        """A hierarchy, and the process in `group` of it. Returns its folder."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        kind, options = ("cgroup2", "rw") if version == 2 else ("cgroup", f"rw,{name}")
        self.mounts.append(f"31 23 0:28 {root} {folder} rw,relatime shared:9 - {kind} {kind} {options}\n")
        self.lines.append(f"0::{group}\n" if version == 2 else f"4:{name}:{group}\n")
        (self.proc / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda rw\n" + "".join(self.mounts))
        (self.proc / "cgroup").write_text("".join(self.lines))
        return folder


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def write(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def v2(limit: object, usage: int, *, high: object = "max", **stat: int) -> dict[str, object]:
    lines = "\n".join(f"{name} {value}" for name, value in stat.items())
    return {"memory.max": limit, "memory.high": high, "memory.current": usage, "memory.stat": lines}


def v1(limit: object, usage: int, *, hierarchy: int = 1, **stat: object) -> dict[str, object]:
    lines = "\n".join(f"{name} {value}" for name, value in stat.items())
    return {
        "memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": lines,
        "memory.use_hierarchy": hierarchy,
    }  # fmt: skip


def available(tree: Tree) -> list[tuple[str, int]]:
    return [(group.path, group.available_bytes) for group in memory_groups(tree.proc)]


def test_cache_that_can_be_dropped_is_free(tree: Tree) -> None:
    folder = tree.mount("unified", version=2, group="/box")
    stat = {"anon": 100, "inactive_file": 2000, "active_file": 700, "file_mapped": 300, "file_dirty": 40}
    write(folder / "box", v2(3000, 2900, **stat, file_writeback=60, shmem=50))
    assert available(tree) == [("/box", 3000 - 2900 + 2700 - 400)]


def test_cache_that_can_be_dropped_is_free_in_version_1(tree: Tree) -> None:
    folder = tree.mount("memory", version=1, group="/box")
    own = {"inactive_file": 1, "active_file": 1, "mapped_file": 1}  # of the group alone, without those below
    stat = {"total_inactive_file": 2000, "total_active_file": 700, "total_mapped_file": 300, "total_dirty": 40}
    write(folder / "box", v1(3000, 2900, **own, **stat, total_writeback=60, hierarchical_memory_limit=3000))
    write(folder, v1(V1_NO_LIMIT, 5000, hierarchical_memory_limit=V1_NO_LIMIT))
    assert available(tree) == [("/box", 3000 - 2900 + 2700 - 400)]


def test_every_group_above_binds(tree: Tree) -> None:
    folder = tree.mount("unified", version=2, group="/a/b/c")
    write(folder / "a", v2(1000, 600))
    write(folder / "a/b", v2("max", 600))
    write(folder / "a/b/c", v2(8000, 100, high=7000))
    assert available(tree) == [("/a/b/c", 6900), ("/a", 400)]


def test_groups_above_in_version_1(tree: Tree) -> None:
    folder = tree.mount("memory", version=1, group="/a/b")
    write(folder / "a", v1(1000, 600, hierarchical_memory_limit=900))
    write(folder / "a/b", v1(8000, 100, hierarchical_memory_limit=1000))
    assert available(tree) == [("/a/b", 900), ("/a", 300)]
    write(folder / "a", v1(1000, 600, hierarchy=0))
    write(folder / "a/b", v1(8000, 100, hierarchical_memory_limit=8000))
    assert available(tree) == [("/a/b", 7900)]


def test_a_container_that_sees_its_group_as_the_root(tree: Tree) -> None:
    folder = tree.mount("memory", version=1, group="/docker/12ab/inner", root="/docker/12ab")
    write(folder, v1(1000, 100))
    write(folder / "inner", v1(500, 100))
    assert available(tree) == [("/inner", 400), ("/", 900)]


def test_a_group_that_is_over_its_limit_or_unreadable(tree: Tree) -> None:
    folder = tree.mount("unified", version=2, group="/a/b")
    write(folder / "a", v2(1000, 1200))
    write(folder / "a/b", {"memory.max": 500, "memory.current": "?"})
    assert available(tree) == [("/a", 0)]
    assert memory_groups(tree.folder / "nowhere") == []


@pytest.mark.parametrize(
    ("own", "above", "quota"),
    [("250000 100000", "max 100000", 2.5), ("400000 100000", "150000 100000", 1.5), ("max 100000", "max 100000", None)],
)
def test_quota_of_version_2(tree: Tree, own: str, above: str, quota: float | None) -> None:
    folder = tree.mount("unified", version=2, group="/a/b")
    write(folder / "a", {"cpu.max": above})
    write(folder / "a/b", {"cpu.max": own})
    assert processor_quota(tree.proc) == quota


def test_quota_of_version_1(tree: Tree) -> None:
    folder = tree.mount("cpu", version=1, group="/a/b")
    write(folder / "a", {"cpu.cfs_quota_us": 300000, "cpu.cfs_period_us": 100000})
    write(folder / "a/b", {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000})
    assert processor_quota(tree.proc) == 3


@pytest.mark.parametrize(("quota", "cores"), [(None, 6), (2.9, 2), (0.5, 1), (64.0, 6)])
def test_whole_processors_of_a_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(machine, "processor_quota", lambda: quota)
    assert machine.num_cores() == cores


def test_members(tree: Tree) -> None:
    tree.mount("unified", version=2, group="/a/bc")
    proc = tree.proc
    assert [is_in_group(path, proc) for path in ("/", "/a", "/a/bc", "/a/b", "/a/bc/d", "/x")] == [True] * 3 + [
        False
    ] * 3


def test_what_others_have_planned_is_not_free(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine in the same group, one outside: the machine has both, the group one."""
    folder = tree.mount("unified", version=2, group="/box")
    write(folder / "box", v2(3 * GIB, GIB))
    monkeypatch.setattr(machine, "memory_groups", lambda: memory_groups(tree.proc))
    monkeypatch.setattr(machine, "is_in_group", lambda path, proc: proc.name == "7")
    monkeypatch.setattr(machine, "outstanding", lambda: claims)
    claims = [Outstanding(pid=7, num_bytes=GIB // 2), Outstanding(pid=8, num_bytes=GIB)]
    free = [8 * GIB]
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: type("V", (), {"available": free[0]}))
    assert machine.available_ram_bytes() == 3 * GIB // 2
    free[0] = 2 * GIB
    assert machine.available_ram_bytes() == GIB // 2
    free[0] = GIB
    assert machine.available_ram_bytes() == 0
