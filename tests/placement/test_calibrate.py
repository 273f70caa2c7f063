"""Calibration: a virtual machine's speeds are found again, nothing is left under way, real copiers are served."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_at_rest, open_tiny, save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from inline_copier import InlineCopier
from virtual_machine import Job, Speeds, VirtualMachine

from offmoe.loader.costs import NUM_ROWS
from offmoe.moe.cpu_backend import CpuBackend
from offmoe.placement.calibrate import measure
from offmoe.tiers.copier import CopyPart, count_bytes
from offmoe.tiers.device import SimulatedDevice

EXPERT_BYTES, NUM_EXPERTS = 64 << 10, 4


def make_experts() -> list[list[CopyPart]]:
    src = torch.arange(NUM_EXPERTS * EXPERT_BYTES, dtype=torch.int64).to(torch.uint8).view(NUM_EXPERTS, -1)
    dst = torch.zeros_like(src)
    half = EXPERT_BYTES // 2
    return [[(src[i, :half], dst[i, :half]), (src[i, half:], dst[i, half:])] for i in range(NUM_EXPERTS)]


class VirtualCopier:
    """A link in virtual time. Slots must not be copied to twice at once."""

    def __init__(self, machine: VirtualMachine) -> None:
        self.machine = machine
        self.under_way: dict[int, Job] = {}

    def copy(self, parts: Sequence[CopyPart], *, urgent: bool = True, after: object | None = None) -> Job:
        at = parts[0][1].data_ptr()
        assert at not in self.under_way or self.under_way[at].done()
        self.under_way[at] = self.machine.link.submit(count_bytes(parts), urgent=urgent)
        return self.under_way[at]

    def mark(self) -> None: ...
    def restart(self) -> None: ...
    def close(self) -> None: ...


@settings(max_examples=20)
@given(st.floats(1e9, 50e9), st.floats(1e9, 50e9), st.floats(1, 2), st.floats(1, 2))
def test_finds_the_speeds_of_a_machine(link: float, cpu: float, link_slowdown: float, cpu_slowdown: float) -> None:
    speeds = Speeds(link=link, cpu=cpu, link_beside_cpu=link / link_slowdown, cpu_beside_link=cpu / cpu_slowdown)
    machine = VirtualMachine(speeds)
    copier = VirtualCopier(machine)

    def compute(idx: int) -> None:
        machine.wait(machine.cpu.submit(EXPERT_BYTES))

    costs = measure(
        copier, make_experts(), compute, disk_bytes_per_s=1e9, cpu_flops_per_s=1e11, clock=machine.clock,
        phase_s=0.01, phase_bytes=1 << 40,
    )  # fmt: skip
    assert machine.now_s < 0.06
    assert all(job.done() for job in copier.under_way.values())
    assert costs.link_bytes_per_s == pytest.approx(link, rel=0.01)
    assert costs.cpu_bytes_per_s == pytest.approx(cpu, rel=0.01)
    if link < 2 * cpu:  # else the link runs dry while one product is computed
        assert costs.link_beside_cpu_bytes_per_s == pytest.approx(link / link_slowdown, rel=0.05)
        assert costs.cpu_beside_link_bytes_per_s == pytest.approx(cpu / cpu_slowdown, rel=0.05)


def test_bytes_are_limited() -> None:
    experts, computed = make_experts(), []
    ticks = iter(range(10**9))
    measure(
        InlineCopier(), experts, computed.append, disk_bytes_per_s=1e9, cpu_flops_per_s=1e11,
        clock=lambda: next(ticks) * 1e-6, phase_s=1e9, phase_bytes=10 * EXPERT_BYTES,
    )  # fmt: skip
    assert 1 + 10 <= len(computed) <= 1 + 10 + 10
    assert all(torch.equal(src, dst) for parts in experts for src, dst in parts)


def test_a_copy_that_fails_leaves_nothing_under_way() -> None:
    machine = VirtualMachine(Speeds())
    copier = VirtualCopier(machine)
    calls = 0

    def compute(idx: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        machine.wait(machine.cpu.submit(EXPERT_BYTES))

    with pytest.raises(KeyboardInterrupt):
        measure(
            copier, make_experts(), compute, disk_bytes_per_s=1e9, cpu_flops_per_s=1e11, clock=machine.clock,
            phase_s=20 * EXPERT_BYTES / 48e9, phase_bytes=1 << 40,
        )  # fmt: skip
    assert machine.link.queued_bytes == 0


def test_costs_are_of_the_kernels_that_serve_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that is computed in RAM is computed by CpuBackend; torch's own products are several times as slow."""
    served: list[int] = []
    compute = CpuBackend.compute

    def counted(self: CpuBackend, layer_idx: int, math: Any, experts: list[Any], x_TD: Any, y_SD: Any) -> None:
        served.append(len(x_TD))
        compute(self, layer_idx, math, experts, x_TD, y_SD)

    monkeypatch.setattr(CpuBackend, "compute", counted)
    with open_tiny(save_tiny(tmp_path), miss="auto", simulated=SimulatedDevice(1e9)) as engine:
        assert set(served) == {1, NUM_ROWS}
        assert engine.stats()["ram_hits"] == 0, "look-ups of the measurement are no tokens'"
        assert_at_rest(engine)


def test_a_phase_that_begins_late_measures_something() -> None:
    """On a busy machine a phase may be over when it begins: one copy and one product are measured all the same."""
    ticks = itertools.count(0, 100)
    costs = measure(
        InlineCopier(), make_experts(), lambda idx: None, disk_bytes_per_s=1e9, cpu_flops_per_s=1e11,
        clock=lambda: float(next(ticks)), phase_s=0.01,
    )  # fmt: skip
    # The clock is asked when a phase begins, before the second expert, after the first, and at the end.
    assert costs.link_bytes_per_s == EXPERT_BYTES / 300
    assert costs.cpu_bytes_per_s == EXPERT_BYTES / 200
    assert 0 < costs.link_beside_cpu_bytes_per_s <= costs.link_bytes_per_s
    assert 0 < costs.cpu_beside_link_bytes_per_s <= costs.cpu_bytes_per_s
