"""Any one call that the system refuses: a clear error or the right result, nothing left behind, and usable afterwards.

Every operation and seam of fault_operations.py, at a stride that keeps it cheap; scripts/fault_injection.py fails every
single call.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from engines import leaves_nothing, open_tiny, save_speaking, save_tiny
from families import build, save_layout
from fault_operations import OPERATIONS, Case, Tally
from faults import COPIES, KERNELS, MAPS, READS, TENSORS, THREADS, WRITES, Gate, Seam, each_nth

from offmoe.core.errors import DiskReadError, ResourceError
from offmoe.hf.device_failures import explain
from offmoe.tiers.work_queue import WorkQueue

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads what a process holds from /proc")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model for operations on ids, one that speaks, and one whose widths can be quantised."""
    root = tmp_path_factory.mktemp("faults")
    widths = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96}
    (root / "wide").mkdir()
    save_layout(build("qwen3_moe", overrides=widths), root / "wide", "published")
    return {"ids": save_tiny(root / "ids"), "text": save_speaking(root / "text"), "wide": root / "wide"}


def run(models: dict[str, Path], work: Path, name: str, seam: Seam, **options: Any) -> Tally:
    model = models[{"chat": "text", "save": "text", "quantize": "wide"}.get(name, "ids")]
    case = Case(model=model, work=work, on_device=seam is COPIES)
    tally = OPERATIONS[name](case, seam, **options)
    assert not tally.wrong, "\n".join(tally.wrong)
    return tally


@pytest.mark.parametrize(
    ("name", "seam", "stride", "least"),
    [
        ("load", READS, 15, 3), ("load", MAPS, 1, 1), ("load", THREADS, 4, 2),
        ("generate", READS, 7, 2), ("generate", KERNELS, 13, 4), ("generate", TENSORS, 61, 1),
        ("chat", KERNELS, 41, 1), ("save", WRITES, 1, 3), ("trace", WRITES, 1, 3),
        ("quantize", READS, 41, 2), ("quantize", WRITES, 31, 1),
    ],
)  # fmt: skip
def test_the_nth_call_fails(
    models: dict[str, Path], tmp_path: Path, name: str, seam: Seam, stride: int, least: int
) -> None:
    assert run(models, tmp_path, name, seam, stride=stride).failed >= least


@pytest.mark.parametrize(("name", "seam"), [("load", THREADS), ("generate", READS)])
def test_all_calls_from_the_nth_on_fail(models: dict[str, Path], tmp_path: Path, name: str, seam: Seam) -> None:
    tally = run(models, tmp_path, name, seam, stride=6, lasting=True)
    assert tally.refused == tally.failed > 0, tally


def test_a_copy_fails(models: dict[str, Path], tmp_path: Path) -> None:
    """As on a lost device: the engine is closed, and another one works."""
    tally = run(models, tmp_path, "generate", COPIES, stride=9)
    assert tally.refused == tally.failed > 0, tally


def test_a_header_that_cannot_be_read_is_not_called_damaged(models: dict[str, Path]) -> None:
    """Before, its OSError reached the user as a traceback, and that of config.json said to download it again."""
    messages = set()
    folder = models["ids"]
    for outcome in each_nth(lambda: open_tiny(folder).close(), READS, folder, stride=3, most=8, lasting=True):
        assert type(outcome.error) is DiskReadError, outcome
        messages.add(str(outcome.error))
    advice = "close other files, or raise the limit (ulimit -n)"
    assert f"cannot read {folder}/config.json: Too many open files; {advice}" in messages
    assert not any("download" in message for message in messages), messages


def test_fewer_threads_do_the_work_and_none_is_left() -> None:
    """Before, a refused thread was a RuntimeError, and those that had started stayed for ever."""
    with leaves_nothing():
        with THREADS.guarded_by(Gate(3, lasting=True), Path()):
            queue = WorkQueue(8, "offmoe-test")
        done: list[int] = []
        queue.submit([lambda: done.append(1)] * 5, urgent=True).wait()
        assert len(done) == 5
        with THREADS.guarded_by(Gate(1, lasting=True), Path()):
            queue.restart()  # clears up, whatever the system says
            with pytest.raises(ResourceError, match="offmoe-test needs 1 of 8"):
                queue.submit([lambda: done.append(1)], urgent=True)
        queue.submit([lambda: done.append(1)], urgent=True).wait()
        assert len(done) == 6
        queue.close()
        with pytest.raises(ValueError, match="closed"):
            queue.submit([], urgent=True)


def test_what_torch_says_of_full_memory() -> None:
    """The number is torch's own."""
    text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 16777216 bytes. Error code 12"
    error = explain(RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] err == 0. {text}"), None)
    assert str(error).startswith("memory ran out: the system refused 16.0 MiB; ")
    assert explain(RuntimeError("shapes cannot be multiplied"), None) is None
