"""The virtual machine itself: time, contention, priority between chunks, cancellation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_machine import CancelledJobError, Speeds, VirtualMachine

SPEEDS = Speeds(link=10.0, cpu=40.0, device=100.0, disk=5.0)


def test_lanes_run_side_by_side() -> None:
    machine = VirtualMachine(SPEEDS)
    copy, work = machine.link.submit(100), machine.cpu.submit(100)
    machine.wait(work)
    assert machine.now_s == 2.5 and copy.left_bytes == 75 and not copy.done()
    assert machine.wait(copy) == 10.0 and machine.link.busy_s == 10.0


def test_link_and_cpu_slow_each_other_only_while_both_run() -> None:
    machine = VirtualMachine(Speeds(link=10.0, cpu=40.0, link_beside_cpu=5.0, cpu_beside_link=20.0))
    copy, work = machine.link.submit(100), machine.cpu.submit(100)
    assert machine.wait(copy, work) == 5.0 + 75 / 10.0
    assert work.end_s == 5.0


def test_an_urgent_job_overtakes_between_chunks() -> None:
    machine = VirtualMachine(SPEEDS, chunk_bytes=10)
    ahead = [machine.link.submit(30, urgent=False) for _ in range(2)]
    machine.advance(0.5)
    urgent = machine.link.submit(20)
    machine.drain()
    assert (urgent.begin_s, urgent.end_s) == (1.0, 3.0)
    assert [job.end_s for job in ahead] == [5.0, 8.0]


def test_a_promoted_job_overtakes_but_not_the_urgent_before_it() -> None:
    machine = VirtualMachine(SPEEDS, chunk_bytes=10)
    first, second = machine.link.submit(20, urgent=False), machine.link.submit(20, urgent=False)
    urgent = machine.link.submit(10)
    second.promote()
    machine.drain()
    assert (urgent.end_s, second.end_s, first.end_s) == (2.0, 4.0, 5.0)


def test_cancel_takes_back_what_has_not_begun() -> None:
    machine = VirtualMachine(SPEEDS, chunk_bytes=10)
    running, waiting = machine.link.submit(30), machine.link.submit(30)
    assert waiting.cancel() and not waiting.cancel()
    machine.advance(0.5)
    assert running.cancel() and not running.done()
    assert machine.drain() == 1.0 and machine.link.carried_bytes == 10
    for job in (running, waiting):
        with pytest.raises(CancelledJobError):
            machine.wait(job)
    last = machine.link.submit(10)
    machine.advance(0.5)
    assert not last.cancel()
    assert machine.wait(last) == 2.0 and not last.cancel()


def test_after_and_latency() -> None:
    machine = VirtualMachine(Speeds(link=10.0, disk=5.0, device=100.0, link_latency_s=1.0))
    read = machine.disk.submit(10)
    copy = machine.link.submit(10, after=[read])
    arrival = machine.device.submit(0, after=[copy])
    assert machine.wait(arrival) == 2.0 + 1.0 + 1.0
    assert copy.begin_s == 2.0


def test_idle_time_passes() -> None:
    machine = VirtualMachine(SPEEDS)
    assert machine.advance(3.0) == 3.0 and machine.run_until(1.0) == 3.0 and machine.drain() == 3.0


@given(
    st.lists(st.tuples(st.sampled_from(["link", "cpu", "disk", "device"]), st.integers(0, 1000), st.booleans())),
    st.sampled_from([7.0, 100.0, float("inf")]),
)
def test_every_job_ends_and_every_byte_is_carried_once(jobs: list[tuple[str, int, bool]], chunk: float) -> None:
    machine = VirtualMachine(Speeds(link=10.0, cpu=40.0, link_beside_cpu=7.0, cpu_beside_link=30.0), chunk_bytes=chunk)
    submitted = [getattr(machine, lane).submit(num_bytes, urgent=urgent) for lane, num_bytes, urgent in jobs]
    machine.drain()
    assert all(job.done() and job.left_bytes == 0 for job in submitted)
    for name in ("link", "cpu", "disk", "device"):
        lane = getattr(machine, name)
        assert lane.carried_bytes == pytest.approx(sum(n for where, n, _ in jobs if where == name))
        assert lane.busy_s <= machine.now_s * (1 + 1e-9)
