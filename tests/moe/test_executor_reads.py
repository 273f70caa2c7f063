"""One MoE layer through the cache: what is read and kept, and what a call that fails leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from executor_cases import PADDING, Call, LateDisk, LateTicket, gated, make_math
from makers import Opened, RecordingDisk, TinyExperts, failing_reads, open_cache

from offmoe.checkpoint.expert_index import ReadPlan
from offmoe.core.errors import DiskReadError
from offmoe.core.keys import ExpertKey
from offmoe.moe import layer_call
from offmoe.moe.executor import Executor
from offmoe.tiers.copier import Ticket


@pytest.fixture
def opened(tiny: TinyExperts) -> Iterator[Opened]:
    with open_cache(tiny, num_slots=4) as made:
        yield made
        made.assert_at_rest()


# --- what is read, and what is kept


@pytest.mark.parametrize("num_slots", [1, 3, 16])
@pytest.mark.parametrize("num_tokens", [1, 64])
def test_an_expert_is_read_at_most_once_in_a_call(tiny: TinyExperts, num_slots: int, num_tokens: int) -> None:
    with open_cache(tiny, num_slots=num_slots) as opened:
        for seed in range(4):
            call = Call(0, num_tokens, seed)
            before, cached = len(opened.disk.plans_read), opened.cached()
            call.run(Executor(opened.cache))
            read = opened.disk.plans_read[before:]
            assert len(set(read)) == len(read) == len(call.experts - cached)


def test_hits_and_misses_are_counted_by_expert(opened: Opened) -> None:
    executor, counters = Executor(opened.cache), opened.cache.counters
    Call(0, 1).choosing([1, 2]).run(executor)
    assert (counters.hits, counters.misses, counters.layer_calls) == (0, 2, 1)
    Call(0, 3).choosing([1, 2], [1, 1], [2, PADDING]).run(executor)
    assert (counters.hits, counters.misses, counters.layer_calls) == (2, 2, 2)
    Call(1, 1).choosing([1, 2]).run(executor)  # the same numbers in another layer are other experts
    assert (counters.hits, counters.misses) == (2, 4)


def test_decoding_keeps_what_it_used_last(opened: Opened) -> None:
    executor = Executor(opened.cache)
    for ids in ([0, 1], [2, 3], [0, 4]):
        Call(0, 1).choosing(ids).run(executor)
    assert opened.cached() == {ExpertKey(0, idx) for idx in (0, 2, 3, 4)} - {ExpertKey(0, 1)}


def test_a_long_prompt_keeps_its_busiest_experts_and_what_decoding_uses(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four slots, two layers: a prompt may keep two experts of a layer, the other six pass through one slot."""
    monkeypatch.setattr(layer_call, "MAX_READS_IN_FLIGHT", 1)
    executor = Executor(opened.cache)
    Call(1, 1).choosing([1, 0]).run(executor)
    Call(0, 9).choosing([6, 0], [6, 1], [6, 2], [6, 3], [6, 4], [3, 5], [3, 7], [3, 6], [3, 6]).run(executor)
    busiest = {ExpertKey(0, 3), ExpertKey(0, 6)}
    assert opened.cached() == busiest | {ExpertKey(1, 1), ExpertKey(0, 7)}
    Call(1, 1).choosing([2, 2]).run(executor)  # what passed through goes before what was kept
    assert opened.cached() == busiest | {ExpertKey(1, 1), ExpertKey(1, 2)}


def test_a_prompt_within_its_share_keeps_everything(opened: Opened) -> None:
    executor = Executor(opened.cache)
    call = Call(0, 3).choosing([0, 1], [1, 0], [0, 0])
    call.run(executor)
    Call(1, 2).choosing([4, 5], [4, 5]).run(executor)
    assert call.experts <= opened.cached()


def test_experts_in_memory_are_computed_while_others_are_read(tiny: TinyExperts) -> None:
    events = []

    class Watched(RecordingDisk):
        def read(self, plan: ReadPlan, slot: memoryview, *, urgent: bool = True) -> Ticket:
            events.append("read starts")
            inner = super().read(plan, slot)

            class Watching:
                def done(self) -> bool:
                    return False

                def wait(self) -> None:
                    inner.wait()
                    events.append("read ends")

            return Watching()

    def activate(up_N2F: torch.Tensor) -> torch.Tensor:
        events.append(f"computes {up_N2F.shape[0]}")
        return gated(up_N2F)

    with open_cache(tiny, num_slots=4, disk_type=Watched) as opened:
        executor, math = Executor(opened.cache), make_math(activate)
        Call(0, 1).choosing([0, 1]).run(executor, math)
        events.clear()
        Call(0, 1).choosing([0, 1, 2]).run(executor, math)
    assert events[0] == "read starts"
    assert events.index("read ends") > max(idx for idx, event in enumerate(events[:-1]) if event.startswith("computes"))


def test_reads_in_flight_are_bounded(tiny: TinyExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_call, "MAX_READS_IN_FLIGHT", 3)
    in_flight, most = [0], [0]

    class Counting(LateDisk):
        def read(self, plan: ReadPlan, slot: memoryview, *, urgent: bool = True) -> Ticket:
            in_flight[0] += 1
            most[0] = max(most[0], in_flight[0])

            def ends() -> None:
                RecordingDisk.read(self, plan, slot).wait()
                in_flight[0] -= 1

            return LateTicket(ends, self.chance)

    with open_cache(tiny, num_slots=16, disk_type=Counting) as opened:
        Call(0, 64).run(Executor(opened.cache))
    assert (most, in_flight) == ([3], [0])


# --- failures leave nothing behind


@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("bad", range(3))
def test_a_failing_expert_fails_the_call_and_nothing_else(opened: Opened, num_tokens: int, bad: int) -> None:
    executor = Executor(opened.cache)
    Call(0, 1).choosing([0, 5]).run(executor)
    call = Call(0, num_tokens, top_k=4).choosing(*[[0, 1, 2, 3]] * num_tokens)
    with failing_reads(opened, ExpertKey(0, bad)):
        if bad == 0:  # it is in memory: no read, no failure
            call.run(executor)
        else:
            with pytest.raises(DiskReadError, match="check the drive"):
                call.run(executor)
        opened.assert_at_rest()
        assert (ExpertKey(0, bad) in opened.cached()) == (bad == 0)
        others = Call(0, num_tokens, seed=1).choosing(*[[4, 7]] * num_tokens)
        torch.testing.assert_close(others.run(executor), others.eager(opened.tiny), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(call.run(executor), call.eager(opened.tiny), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("after", [0, 1])
def test_a_call_stopped_while_computing_leaves_nothing_behind(
    tiny: TinyExperts, num_tokens: int, error: type[BaseException], after: int
) -> None:
    """With a hit and with reads under way; `after` as many computations."""
    left = [after]

    def activate(up_N2F: torch.Tensor) -> torch.Tensor:
        if not left[0]:
            raise error
        left[0] -= 1
        return gated(up_N2F)

    call = Call(0, num_tokens, top_k=5).choosing(*[[0, 1, 2, 3, 4]] * num_tokens)
    with open_cache(tiny, num_slots=4, disk_type=LateDisk) as opened:
        executor = Executor(opened.cache)
        Call(0, 1).choosing([0]).run(executor)
        with pytest.raises(error):
            call.run(executor, make_math(activate))
        opened.assert_at_rest()
        torch.testing.assert_close(call.run(executor), call.eager(tiny), rtol=1e-5, atol=1e-5)
        opened.assert_at_rest()


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_call_stopped_while_waiting_leaves_nothing_behind(tiny: TinyExperts, num_tokens: int) -> None:
    class Interrupted(LateDisk):
        presses = 1

        def read(self, plan: ReadPlan, slot: memoryview, *, urgent: bool = True) -> Ticket:
            def read() -> None:
                if self.presses and len(self.plans_read) >= 1:
                    self.presses -= 1
                    raise KeyboardInterrupt
                RecordingDisk.read(self, plan, slot).wait()

            return LateTicket(read, self.chance)

    call = Call(0, num_tokens, top_k=4).choosing(*[[0, 1, 2, 3]] * num_tokens)
    with open_cache(tiny, num_slots=3, disk_type=Interrupted) as opened:
        with pytest.raises(KeyboardInterrupt):
            call.run(Executor(opened.cache))
        opened.assert_at_rest()
        torch.testing.assert_close(call.run(Executor(opened.cache)), call.eager(tiny), rtol=1e-5, atol=1e-5)
        opened.assert_at_rest()
