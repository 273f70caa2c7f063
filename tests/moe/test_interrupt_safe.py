"""Ctrl-C at every line of cache and executor in turn: the books are in order afterwards, and the next call is right."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from executor_cases import Call, make_math
from interrupts import Interrupt, Line
from makers import Opened, TinyExperts, failing_reads, open_cache

import offmoe
from offmoe.cache.slots import SlotTable
from offmoe.core.errors import DiskReadError
from offmoe.core.keys import ExpertKey
from offmoe.moe.executor import Executor
from offmoe.moe.interrupt_safe import InterruptSafeExecutor

PACKAGE = Path(offmoe.__file__).parent
INTERRUPTED_FILES = {
    str(PACKAGE / name)
    for name in (
        "cache/expert_cache.py", "cache/slots.py", "cache/ranking.py", "moe/executor.py", "moe/dispatch.py",
        "tiers/work_queue.py", "kernels/reference.py", "formats/dense.py",
    )
}  # fmt: skip


def line_after(function: Callable[..., object], text: str) -> Line:
    """The line of `function` that follows the first one with `text` in it."""
    lines, first = inspect.getsourcelines(function)
    return str(inspect.getsourcefile(function)), first + 1 + next(i for i, line in enumerate(lines) if text in line)


def start(opened: Opened) -> tuple[InterruptSafeExecutor, Call]:
    """An executor in use, and a call with hits, misses and more experts than slots are free."""
    executor = InterruptSafeExecutor(Executor(opened.cache))
    Call(0, 1).choosing([0, 1]).run(executor)
    Call(1, 1).choosing([0, 1]).run(executor)
    return executor, Call(0, 2, top_k=4).choosing([0, 1, 2, 3], [3, 2, 1, 0])


@pytest.mark.parametrize(
    ("policy", "files"),
    [
        ("lru", INTERRUPTED_FILES),
        *((name, {str(PACKAGE / "cache/frequency.py")}) for name in ("lfru", "decayed")),
    ],
)
def test_ctrl_c_at_every_line(tiny: TinyExperts, policy: str, files: set[str]) -> None:
    with open_cache(tiny, num_slots=4, policy=policy) as opened:
        executor, call = start(opened)
        with Interrupt(files) as watch:
            call.run(executor)
    assert {name for name, _ in watch.ran} == files
    for line in watch.ran:
        with open_cache(tiny, num_slots=4, policy=policy) as opened:
            executor, call = start(opened)
            with contextlib.suppress(KeyboardInterrupt), Interrupt(files, line=line):
                call.run(executor)
            opened.assert_at_rest()
            for later in (call, Call(1, 1).choosing([0, 5])):
                torch.testing.assert_close(later.run(executor), later.eager(tiny), rtol=1e-5, atol=1e-5)
                opened.assert_at_rest()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_what_was_whole_stays_cached(tiny: TinyExperts, error: type[BaseException]) -> None:
    def fail(up_N2F: torch.Tensor) -> torch.Tensor:
        raise error

    with open_cache(tiny, num_slots=8) as opened:
        executor, call = start(opened)
        before = opened.cached()
        with pytest.raises(error):
            call.run(executor, make_math(fail))
        opened.assert_at_rest()
        assert before <= opened.cached()


def test_recovery_keeps_the_order_of_eviction(tiny: TinyExperts) -> None:
    with open_cache(tiny, num_slots=4) as opened:
        executor, _ = start(opened)
        Call(0, 1).choosing([0, 0]).run(executor)  # the newest now; the oldest is (0, 1)
        opened.cache.recover()
        Call(1, 1).choosing([7, 7]).run(executor)
        assert opened.cached() == {ExpertKey(0, 0), ExpertKey(1, 0), ExpertKey(1, 1), ExpertKey(1, 7)}


def test_a_failed_read_needs_no_recovery(tiny: TinyExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_cache(tiny, num_slots=4) as opened:
        executor, call = start(opened)
        monkeypatch.setattr(opened.cache, "recover", lambda: pytest.fail("recovered"))
        with failing_reads(opened, ExpertKey(0, 3)), pytest.raises(DiskReadError):
            call.run(executor)
        opened.assert_at_rest()
        torch.testing.assert_close(call.run(executor), call.eager(tiny), rtol=1e-5, atol=1e-5)


def test_a_broken_off_recovery_is_done_before_the_next_call(tiny: TinyExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_cache(tiny, num_slots=4) as opened:
        executor, call = start(opened)
        with monkeypatch.context() as patch:
            patch.setattr(opened.cache, "recover", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
            # A slot is off the free list and in no map.
            with (
                Interrupt(INTERRUPTED_FILES, line=line_after(SlotTable.reserve, "pop()")),
                pytest.raises(KeyboardInterrupt),
            ):
                call.run(executor)
        torch.testing.assert_close(call.run(executor), call.eager(tiny), rtol=1e-5, atol=1e-5)
        opened.assert_at_rest()
