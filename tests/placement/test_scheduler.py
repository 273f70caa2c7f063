"""Misses are placed in virtual time: never more than 3% behind the best fixed choice, whatever the model believes."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache

import pytest
from virtual_machine import Speeds, VirtualMachine

from offmoe.machine.costs import Costs
from offmoe.placement.choose import Miss, Placement, PlacementMode
from offmoe.placement.scheduler import MissScheduler

EXPERT_BYTES = 9_000_000
NUM_LAYERS, TOP_K, NUM_PASSES = 6, 8, 1000
CPU_SPEED = 48e9
FIXED_S = 1e-4


def speeds_of(ratio: float) -> Speeds:
    link = ratio * CPU_SPEED
    return Speeds(link=link, cpu=CPU_SPEED, link_beside_cpu=link / 1.15, cpu_beside_link=CPU_SPEED / 1.3)


def costs_of(speeds: Speeds, *, link_error: float = 1.0, cpu_error: float = 1.0) -> Costs:
    assert speeds.link_beside_cpu is not None and speeds.cpu_beside_link is not None
    return Costs(
        link_bytes_per_s=speeds.link * link_error, cpu_bytes_per_s=speeds.cpu * cpu_error,
        link_beside_cpu_bytes_per_s=speeds.link_beside_cpu * link_error,
        cpu_beside_link_bytes_per_s=speeds.cpu_beside_link * cpu_error, disk_bytes_per_s=2e9, cpu_flops_per_s=2e11,
    )  # fmt: skip


def noisy(speeds: Speeds, source: random.Random) -> Speeds:
    """Each pass finds link and CPU a little faster or slower."""
    assert speeds.link_beside_cpu is not None and speeds.cpu_beside_link is not None
    link, cpu = source.lognormvariate(0.0, 0.05), source.lognormvariate(0.0, 0.05)
    return replace(
        speeds, link=speeds.link * link, link_beside_cpu=speeds.link_beside_cpu * link,
        cpu=speeds.cpu * cpu, cpu_beside_link=speeds.cpu_beside_link * cpu,
    )  # fmt: skip


@dataclass
class Runner:
    """Token passes on a virtual machine, placed by a scheduler."""

    machine: VirtualMachine
    scheduler: MissScheduler

    def layer(self, layer_idx: int, num_misses: int) -> list[Placement]:
        machine = self.machine
        placements = self.scheduler.place(layer_idx, [Miss(num_bytes=EXPERT_BYTES)] * num_misses)
        num_fetched = placements.count(Placement.FETCH)
        jobs = [machine.device.submit((TOP_K - num_misses) * EXPERT_BYTES)]
        if num_fetched:
            copy = machine.link.submit(num_fetched * EXPERT_BYTES)
            jobs += [copy, machine.device.submit(EXPERT_BYTES, after=[copy])]  # the last arrival; the others overlap
        if num_fetched < num_misses:
            jobs.append(machine.cpu.submit((num_misses - num_fetched) * EXPERT_BYTES))
        machine.wait(*jobs)
        machine.advance(FIXED_S)
        return placements


def trace_of(hit_rate: float) -> list[list[int]]:
    """Misses of each pass and layer; some layers miss more than others."""
    source = random.Random(hit_rate)
    chances = [min(0.98, (1 - hit_rate) * share) for share in (0.5, 0.8, 1.0, 1.0, 1.2, 1.5)]
    return [[sum(source.random() < chance for _ in range(TOP_K)) for chance in chances] for _ in range(NUM_PASSES)]


def run_trace(
    ratio: float, hit_rate: float, mode: PlacementMode, *, link_error: float = 1.0, cpu_error: float = 1.0
) -> float:
    speeds, source = speeds_of(ratio), random.Random(1)
    machine = VirtualMachine(speeds)
    costs = costs_of(speeds, link_error=link_error, cpu_error=cpu_error)
    runner = Runner(machine, MissScheduler(costs, mode=mode, clock=machine.clock))
    for misses in trace_of(hit_rate):
        machine.speeds = noisy(speeds, source)
        for layer_idx, num_misses in enumerate(misses):
            runner.layer(layer_idx, num_misses)
    return machine.now_s


@cache
def best_fixed_s(ratio: float, hit_rate: float) -> float:
    return min(run_trace(ratio, hit_rate, mode) for mode in (PlacementMode.STREAM, PlacementMode.CPU))


@pytest.mark.parametrize("errors", [(1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (2.0, 0.5), (0.5, 2.0)])
@pytest.mark.parametrize("hit_rate", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
def test_never_far_behind_the_best_fixed_choice(ratio: float, hit_rate: float, errors: tuple[float, float]) -> None:
    """The model is wrong by two in both rates."""
    link_error, cpu_error = errors
    seconds = run_trace(ratio, hit_rate, PlacementMode.AUTO, link_error=link_error, cpu_error=cpu_error)
    assert seconds <= 1.03 * best_fixed_s(ratio, hit_rate)


def test_a_split_beats_both_where_the_link_is_as_fast() -> None:
    assert run_trace(1.0, 0.3, PlacementMode.AUTO) < 0.8 * best_fixed_s(1.0, 0.3)


def test_deterministic() -> None:
    assert run_trace(0.5, 0.9, PlacementMode.AUTO) == run_trace(0.5, 0.9, PlacementMode.AUTO)


def test_prefill_is_not_compared() -> None:
    machine = VirtualMachine(speeds_of(0.5))
    scheduler = MissScheduler(costs_of(speeds_of(0.5)), clock=machine.clock)
    misses = [Miss(num_bytes=EXPERT_BYTES, num_rows=200, flops_per_row=EXPERT_BYTES)] * 16
    for at in range(100):
        assert scheduler.place(at % NUM_LAYERS, misses).count(Placement.FETCH) >= 14
        machine.advance(0.01)
    assert scheduler.trial.total_s == 0.0


def test_forced_modes_are_never_compared() -> None:
    for mode, placement in ((PlacementMode.STREAM, Placement.FETCH), (PlacementMode.CPU, Placement.CPU)):
        scheduler = MissScheduler(costs_of(speeds_of(1.0)), mode=mode, clock=iter(range(10**6)).__next__)
        for at in range(200):
            assert scheduler.place(at % NUM_LAYERS, [Miss(num_bytes=EXPERT_BYTES)] * 4) == [placement] * 4
        assert not scheduler.trial.total_s


def test_time_between_passes_is_not_judged() -> None:
    now_s = [0.0]
    scheduler = MissScheduler(costs_of(speeds_of(0.5)), clock=lambda: now_s[0])
    for _ in range(50):
        for layer_idx in range(2):
            scheduler.place(layer_idx, [Miss(num_bytes=EXPERT_BYTES)])
            now_s[0] += 1.0 if layer_idx == 1 else 0.001
    assert scheduler.trial.total_s == pytest.approx(0.05)
