"""Costs: arithmetic against the virtual machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_machine import Speeds, VirtualMachine

from offmoe.machine.costs import Costs

GB = 1e9


def make_costs(*, link: float, cpu: float, link_slowdown: float = 1.0, cpu_slowdown: float = 1.0) -> Costs:
    return Costs(
        link_bytes_per_s=link, cpu_bytes_per_s=cpu, link_beside_cpu_bytes_per_s=link / link_slowdown,
        cpu_beside_link_bytes_per_s=cpu / cpu_slowdown, disk_bytes_per_s=GB, cpu_flops_per_s=100 * GB,
    )  # fmt: skip


rates = st.floats(1.0, 1e3)
slowdowns = st.floats(1.0, 4.0)
amounts = st.floats(0.0, 1e4)


@given(rates, rates, slowdowns, slowdowns, amounts, amounts)
def test_side_by_side_is_what_a_machine_takes(
    link: float, cpu: float, link_slowdown: float, cpu_slowdown: float, copied: float, computed: float
) -> None:
    costs = make_costs(link=link, cpu=cpu, link_slowdown=link_slowdown, cpu_slowdown=cpu_slowdown)
    machine = VirtualMachine(
        Speeds(
            link=link,
            cpu=cpu,
            link_beside_cpu=costs.link_beside_cpu_bytes_per_s,
            cpu_beside_link=costs.cpu_beside_link_bytes_per_s,
        )
    )
    machine.wait(machine.link.submit(copied), machine.cpu.submit(computed))
    expected = costs.side_by_side_s(costs.link_s(copied), costs.cpu_s(computed))
    assert machine.now_s == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(rates, rates, slowdowns, slowdowns, amounts, amounts)
def test_side_by_side_bounds(
    link: float, cpu: float, link_slowdown: float, cpu_slowdown: float, link_s: float, cpu_s: float
) -> None:
    costs = make_costs(link=link, cpu=cpu, link_slowdown=link_slowdown, cpu_slowdown=cpu_slowdown)
    both_s = costs.side_by_side_s(link_s, cpu_s)
    assert both_s >= max(link_s, cpu_s) * (1 - 1e-12)
    assert costs.side_by_side_s(link_s, 0.0) == link_s and costs.side_by_side_s(0.0, cpu_s) == cpu_s
    assert costs.side_by_side_s(link_s + 1, cpu_s) >= both_s * (1 - 1e-12)


def test_the_cpu_is_bound_by_bytes_then_by_flops() -> None:
    costs = make_costs(link=10 * GB, cpu=40 * GB)
    assert costs.cpu_s(4 * GB, flops=GB) == 0.1
    assert costs.cpu_s(4 * GB, flops=400 * GB) == 4.0
    assert costs.disk_s(2 * GB) == 2.0


def test_impossible_rates_are_refused() -> None:
    with pytest.raises(AssertionError):
        make_costs(link=0.0, cpu=1.0)
    with pytest.raises(AssertionError):
        make_costs(link=1.0, cpu=1.0, link_slowdown=0.5)
