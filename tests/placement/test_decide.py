"""decide(): never beaten by trying everything, forced modes, copies under way, experts on disk, prefill."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_machine import Speeds, VirtualMachine

from offmoe.machine.costs import Costs
from offmoe.placement.choose import GIVE_UP_SHARE, Miss, Placement, PlacementMode, Where, decide, makespan_s

GB = 10**9
FETCH, CPU = Placement.FETCH, Placement.CPU


def make_costs(*, link: float, cpu: float = 50.0, link_slowdown: float = 1.2, cpu_slowdown: float = 1.3) -> Costs:
    return Costs(
        link_bytes_per_s=link * GB, cpu_bytes_per_s=cpu * GB, link_beside_cpu_bytes_per_s=link * GB / link_slowdown,
        cpu_beside_link_bytes_per_s=cpu * GB / cpu_slowdown, disk_bytes_per_s=2 * GB, cpu_flops_per_s=200 * GB,
        link_latency_s=1e-5, cpu_latency_s=2e-5,
    )  # fmt: skip


costs_strategy = st.builds(
    make_costs,
    link=st.floats(1, 100),
    cpu=st.floats(5, 100),
    link_slowdown=st.floats(1, 2),
    cpu_slowdown=st.floats(1, 2),
)
miss_strategy = st.builds(
    Miss,
    num_bytes=st.just(9_000_000),
    num_rows=st.integers(1, 4),
    where=st.sampled_from(Where),
    read_left_bytes=st.none(),
    copy_left_bytes=st.one_of(st.none(), st.integers(0, 9_000_000)),
    worth=st.floats(0, 1),
)
equal_misses = st.integers(0, 7).map(lambda num: [Miss(num_bytes=9_000_000)] * num)


@given(equal_misses, costs_strategy)
def test_no_placement_of_equal_misses_is_faster(misses: list[Miss], costs: Costs) -> None:
    chosen = decide(misses, costs, PlacementMode.AUTO)
    fastest = min(makespan_s(misses, placements, costs) for placements in product(Placement, repeat=len(misses)))
    assert makespan_s(misses, chosen, costs) <= fastest * (1 + 1e-9)


@given(st.lists(miss_strategy, max_size=8), costs_strategy)
def test_never_slower_than_a_fixed_choice_but_for_what_is_under_way(misses: list[Miss], costs: Costs) -> None:
    chosen_s = makespan_s(misses, decide(misses, costs, PlacementMode.AUTO), costs)
    for mode in (PlacementMode.STREAM, PlacementMode.CPU):
        assert chosen_s <= makespan_s(misses, decide(misses, costs, mode), costs) * (1 + 1e-9)
    everywhere_cpu = makespan_s(misses, [CPU] * len(misses), costs)
    assert chosen_s * GIVE_UP_SHARE <= everywhere_cpu * (1 + 1e-9)


@given(st.lists(miss_strategy, max_size=8), costs_strategy)
def test_forced_modes(misses: list[Miss], costs: Costs) -> None:
    assert decide(misses, costs, PlacementMode.STREAM) == [FETCH] * len(misses)
    forced = decide(misses, costs, PlacementMode.CPU)
    assert forced == [FETCH if miss.is_under_way else CPU for miss in misses]


@given(st.integers(1, 7), st.floats(1, 100), st.floats(1, 2))
def test_what_the_model_says_is_what_a_machine_takes(num: int, link: float, slowdown: float) -> None:
    costs = make_costs(link=link, link_slowdown=slowdown, cpu_slowdown=slowdown)
    misses = [Miss(num_bytes=9_000_000)] * num
    placements = decide(misses, costs, PlacementMode.AUTO)
    machine = VirtualMachine(
        Speeds(
            link=costs.link_bytes_per_s,
            cpu=costs.cpu_bytes_per_s,
            link_beside_cpu=costs.link_beside_cpu_bytes_per_s,
            cpu_beside_link=costs.cpu_beside_link_bytes_per_s,
        )
    )
    machine.wait(
        *(
            (machine.link if placement is FETCH else machine.cpu).submit(miss.num_bytes)
            for miss, placement in zip(misses, placements, strict=True)
        )
    )
    latency_s = (num + 1) * 2e-5 * slowdown
    assert machine.now_s <= makespan_s(misses, placements, costs) * (1 + 1e-9) <= machine.now_s + 2 * latency_s


@pytest.mark.parametrize(("link", "num_fetched"), [(10.0, 0), (15.0, 1), (25.0, 2), (50.0, 4), (300.0, 8)])
def test_a_faster_link_carries_more(link: float, num_fetched: int) -> None:
    assert (
        decide([Miss(num_bytes=9_000_000)] * 8, make_costs(link=link), PlacementMode.AUTO).count(FETCH) == num_fetched
    )


def test_most_wanted_are_copied() -> None:
    few, many = Miss(num_bytes=9_000_000), Miss(num_bytes=9_000_000, num_rows=3)
    worthy = Miss(num_bytes=9_000_000, worth=0.5)
    costs = make_costs(link=25.0, link_slowdown=1, cpu_slowdown=1)
    assert decide([few, few, many, few], costs, PlacementMode.AUTO) == [CPU, CPU, FETCH, CPU]
    assert decide([few, few, few, worthy], costs, PlacementMode.AUTO) == [CPU, CPU, CPU, FETCH]


def test_a_copy_under_way_is_waited_for_though_the_cpu_would_be_faster() -> None:
    under_way = Miss(num_bytes=9_000_000, copy_left_bytes=4_000_000)
    assert decide([under_way], make_costs(link=12.0), PlacementMode.AUTO) == [FETCH]
    assert decide([under_way], make_costs(link=12.0), PlacementMode.CPU) == [FETCH]


def test_a_copy_under_way_is_given_up_where_waiting_takes_far_longer() -> None:
    begun = Miss(num_bytes=9_000_000, copy_left_bytes=1_000_000)
    hardly_begun = Miss(num_bytes=9_000_000, copy_left_bytes=9_000_000)
    assert decide([hardly_begun, begun], make_costs(link=5.0), PlacementMode.AUTO) == [CPU, FETCH]


def test_many_rows_are_streamed() -> None:
    """256 rows of a 9 MB bf16 expert: 2.3 GFLOP, 12 ms on the CPU, 0.8 ms on the link."""
    prefill = [Miss(num_bytes=9_000_000, num_rows=256, flops_per_row=9e6)] * 16
    decided = decide(prefill, make_costs(link=12.0), PlacementMode.AUTO)
    assert decided.count(FETCH) >= 15


def test_the_cpu_computes_what_is_in_ram_while_the_drive_reads() -> None:
    on_disk, in_ram = Miss(num_bytes=9_000_000, where=Where.DISK), Miss(num_bytes=9_000_000)
    costs = make_costs(link=12.0)
    placements = decide([on_disk, in_ram, in_ram], costs, PlacementMode.AUTO)
    assert makespan_s([on_disk, in_ram, in_ram], placements, costs) < 0.0045 + 0.00075 + 1e-4
    coming = Miss(num_bytes=9_000_000, where=Where.COMING, read_left_bytes=1_000_000)
    assert makespan_s([coming], [CPU], costs) == pytest.approx(0.0005 + 0.00018, rel=0.01)


def test_nothing_missed() -> None:
    assert decide([], make_costs(link=10.0), PlacementMode.AUTO) == []
    assert makespan_s([], [], make_costs(link=10.0)) == 0.0
