"""Memory that engines have planned, as those that load beside them are told of it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engines import open_tiny, save_tiny

from offmoe.machine import reservations
from offmoe.machine.memory import rss_bytes
from offmoe.machine.reservations import FOLDER_VARIABLE, Reservation, one_at_a_time, outstanding

MIB = 1 << 20
OTHER = """
import sys
from offmoe.machine.memory import rss_bytes
from offmoe.machine.reservations import Reservation
held = Reservation(rss_bytes())
held.reserve(500 << 20)
taken = bytearray(100 << 20)
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def other(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that planned 500 MiB and took 100 of them."""
    command = [sys.executable, "-c", OTHER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def total_mib() -> float:
    return sum(claim.num_bytes for claim in outstanding()) / MIB


def test_what_another_process_will_still_take(folder: Path, other: subprocess.Popen[str]) -> None:
    (claim,) = outstanding()
    assert claim.pid == other.pid and claim.num_bytes / MIB == pytest.approx(400, abs=15)
    other.kill()
    other.wait()
    assert outstanding() == [] and not list(folder.glob("*.json"))  # the dead one's file is removed


def test_engines_of_one_process_together(folder: Path) -> None:
    baseline = rss_bytes()
    first, second = Reservation(baseline), Reservation(baseline)
    first.reserve(300 * MIB)
    second.reserve(200 * MIB)
    assert total_mib() == pytest.approx(500, abs=5)
    first.reserve(100 * MIB)
    assert total_mib() == pytest.approx(300, abs=5)
    second.close()
    assert total_mib() == pytest.approx(100, abs=5)
    del first
    gc.collect()
    assert outstanding() == [] and not list(folder.glob("*.json"))


def test_files_that_are_no_records(folder: Path) -> None:
    Reservation(0).close()
    held = Reservation(rss_bytes())
    held.reserve(MIB)
    record = json.loads(held.path.read_text())
    (folder / "1-0.json").write_text("[" * 5000)
    (folder / "2-0.json").write_text(json.dumps(record | {"planned_bytes": "many"}))
    (folder / "3-0.json").write_text(json.dumps(record | {"started_s": record["started_s"] - 1}))  # a number used again
    (folder / "4-0.json").write_text(json.dumps(record | {"namespace": "another container's"}))
    assert total_mib() == pytest.approx(1, abs=1)
    assert sorted(path.name for path in folder.glob("*.json")) == sorted(["4-0.json", held.path.name])


def test_a_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in its place, a folder that others may write to, a link: nobody is told, and nothing fails."""
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "open", "link"):
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / name))
        held = Reservation(rss_bytes())
        with one_at_a_time():
            held.reserve(MIB)
            assert outstanding() == []
        held.close()
    assert not list(tmp_path.rglob("*.json"))


def test_one_at_a_time_waits_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(reservations.time, "sleep", waits.append)
    times = iter([0.0, 1.0, 2.5])
    with one_at_a_time(), one_at_a_time(clock=lambda: next(times)):
        assert waits == [0.01]


def test_a_child_does_not_withdraw_what_its_parent_reserved(folder: Path) -> None:
    held = Reservation(rss_bytes())
    held.reserve(MIB)
    if not (child := os.fork()):
        held.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert held.path.exists()


def test_an_engine_reserves_until_it_is_closed(folder: Path, tmp_path: Path) -> None:
    with open_tiny(save_tiny(tmp_path / "model")) as engine:
        (path,) = folder.glob("*.json")
        assert json.loads(path.read_text())["planned_bytes"] == engine.plan.total_bytes
        assert [claim.pid for claim in outstanding()] == [psutil.Process().pid]
    assert not list(folder.glob("*.json"))


def test_auto_leaves_what_others_planned(
    folder: Path, other: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("V", (), {"available": 450 * MIB, "total": 1 << 34}))
    import offmoe

    with pytest.raises(
        offmoe.OffmoeError, match=r"ram is \d.*; [34]\d\d\.\d MiB of what is free are kept for other offmoe"
    ):
        offmoe.load(model)
    other.kill()
    other.wait()
    with offmoe.load(model) as engine:
        assert engine.plan.ram_bytes >= 299 * MIB
