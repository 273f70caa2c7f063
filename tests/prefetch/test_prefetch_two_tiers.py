"""Beside a device: disk to RAM has a queue and a comparison of its own, and reads while the drive is idle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import PROMPT, TINY_EXPERTS, leaves_nothing, open_tiny, save_tiny
from inline_copier import InlineCopier
from makers import make_tiny_experts
from two_tiers import TwoTiers, open_two_tiers

import offmoe
from offmoe.core.keys import ExpertKey
from offmoe.loader import load as load_module
from offmoe.prefetch.controller import PrefetchController
from offmoe.prefetch.two_tiers import BelowDevice, TwoTierPrefetcher
from offmoe.tiers.device import SimulatedDevice

HOST_SLOTS, DEVICE_SLOTS = 6, 3
FAR = ExpertKey(1, 2)


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[TwoTiers]:
    tiny = make_tiny_experts(tmp_path)
    with open_two_tiers(tiny, InlineCopier(), host_slots=HOST_SLOTS, device_slots=DEVICE_SLOTS) as opened:
        yield opened


def attach(tiers: TwoTiers, *, link: int | str = "off", disk: int | str = 3) -> TwoTierPrefetcher:
    """Both prefetchers as loader/look_ahead.py makes them, with fixed settings."""
    budget_bytes = 1 << 30
    over_link = PrefetchController(tiers.cache, budget_bytes=budget_bytes, mode=link)  # type: ignore[arg-type]
    from_disk = PrefetchController(
        BelowDevice(tiers.host, tiers.cache),
        budget_bytes=budget_bytes,
        mode=disk,
        far_when_idle=True,  # type: ignore[arg-type]
    )
    return TwoTierPrefetcher(over_link, from_disk, host=tiers.host, counters=tiers.cache.counters)


def fates(tiers: TwoTiers) -> tuple[int, int, int]:
    """Experts that RAM read ahead: started, used, for nothing."""
    counters, size = tiers.host.counters, tiers.host.num_bytes(FAR)
    return counters.ahead_bytes // size, counters.ahead_used_bytes // size, counters.ahead_wasted_bytes // size


def run_layer(tiers: TwoTiers, both: TwoTierPrefetcher, layer_idx: int, *experts: int) -> None:
    """The layer's experts come to the device on demand and go again."""
    both.router_spoke(layer_idx, experts)
    for expert_idx in experts:
        fetch = tiers.cache.start(ExpertKey(layer_idx, expert_idx), cold=False)
        if fetch is not None:
            tiers.cache.finish(fetch)
            tiers.cache.release([fetch.key])
    both.pump()


def land(tiers: TwoTiers) -> None:
    """What is read ahead arrives."""
    while tiers.host.ahead_bytes:
        tiers.host.poll()


def test_a_far_guess_comes_to_ram_alone_and_its_layer_finds_it_there(tiers: TwoTiers) -> None:
    both = attach(tiers)
    both.router_spoke(0, [0])
    both.request(FAR.layer_idx, [FAR.expert_idx], distance=1)
    both.pump()
    land(tiers)
    assert tiers.host.is_ready(FAR) and not tiers.cache.is_ready(FAR) and not tiers.cache.is_coming(FAR)
    run_layer(tiers, both, FAR.layer_idx, FAR.expert_idx)
    assert tiers.cache.is_ready(FAR)
    counters = tiers.cache.counters
    assert (counters.ram_hits, counters.ram_misses) == (1, 0)
    assert fates(tiers) == (1, 1, 0) and counters.ahead_bytes == 0
    tiers.assert_at_rest()


def test_a_wrong_guess_is_wasted_once_its_layer_has_spoken(tiers: TwoTiers) -> None:
    both = attach(tiers)
    both.router_spoke(0, [0])
    both.request(1, [2], distance=1)
    both.pump()
    run_layer(tiers, both, 1, 3)
    land(tiers)
    assert fates(tiers) == (1, 0, 1)
    assert not tiers.host.books.unused


def test_what_the_device_has_is_not_read(tiers: TwoTiers) -> None:
    both = attach(tiers)
    run_layer(tiers, both, 1, 2)
    for key in [key for key in tiers.experts.keys() if key != FAR][:HOST_SLOTS]:  # noqa: SIM118 - a method, not a dict
        fetch = tiers.host.start(key, cold=False)  # RAM forgets it
        if fetch is not None:
            tiers.host.finish(fetch)
            tiers.host.release([key])
    assert not tiers.host.is_ready(FAR) and tiers.cache.is_ready(FAR)
    both.request(1, [2], distance=3)
    both.pump()
    assert not tiers.host.ahead_bytes and not tiers.host.counters.ahead_bytes


def test_nothing_is_read_ahead_while_something_needed_is_read_but_it_is_while_the_link_is_waited_for(
    tiers: TwoTiers,
) -> None:
    both = attach(tiers)
    both.router_spoke(0, [0])
    needed = tiers.host.start(ExpertKey(0, 0), cold=False)
    assert needed is not None and tiers.host.is_demanded
    both.request(1, [2], distance=1)
    both.pump()
    assert not tiers.host.is_coming(FAR)
    tiers.host.finish(needed)
    tiers.host.release([needed.key])
    assert not tiers.host.is_demanded
    both.demand_begins()  # of the link
    both.pump()
    assert tiers.host.is_coming(FAR) or tiers.host.is_ready(FAR)
    both.demand_ends(10)
    land(tiers)
    run_layer(tiers, both, 1, 2)


def test_how_long_the_disk_was_waited_for_is_read_off_the_counters(tiers: TwoTiers) -> None:
    both = attach(tiers)
    tiers.cache.counters.disk_stall_ns += 500_000_000
    both.pass_ended(1.0)
    assert both.from_disk.busy == 0.5 / 16 and both.over_link.busy == 0
    both.pass_ended(1.0)
    assert both.from_disk.busy < 0.5 / 16
    both.reset()
    assert both.is_idle is False and both.from_disk.num_pending == 0


def test_a_near_guess_goes_to_both_where_both_are_on(tiers: TwoTiers) -> None:
    both = attach(tiers, link=1)
    both.router_spoke(0, [0])
    both.request(1, [2], distance=1)
    both.request(2, [2], distance=2)
    assert both.is_on(1) and both.is_on(3) and not attach(tiers, disk="off").is_on(3)
    assert set(both.over_link.wanted) == {FAR} and set(both.from_disk.wanted) == {FAR, ExpertKey(2, 2)}
    assert both.as_dict()["disk"] == both.from_disk.as_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("miss", ["stream", "cpu"])
def test_an_engine_whose_ram_lacks_experts_reads_ahead_and_says_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, miss: str
) -> None:
    make_pool = load_module._make_device_pool

    def with_little_ram(*args: Any, **kwargs: Any) -> Any:
        plan, pool = make_pool(*args, **kwargs)
        return dataclasses.replace(plan, num_slots=TINY_EXPERTS // 2), pool

    def ids(engine: offmoe.Engine) -> tuple[int, ...]:
        return engine.generate(PROMPT, max_new_tokens=24, temperature=0, ignore_eos=True).token_ids

    with leaves_nothing():
        with open_tiny(folder, prefetch="off") as engine:
            expected = ids(engine)
        monkeypatch.setattr(load_module, "_make_device_pool", with_little_ram)
        options = {"miss": miss, "warm_start": False, "simulated": SimulatedDevice(1e12)}
        with open_tiny(folder, prefetch="auto", **options) as engine:
            ahead = engine._parts.serving.ahead
            assert ahead is not None and isinstance(ahead.prefetcher, TwoTierPrefetcher)
            from_disk = ahead.prefetcher.from_disk
            assert from_disk.trial is not None
            from_disk.trial.choice = 3
            from_disk.distance = 3
            assert ids(engine) == expected
            stats = engine.stats()
            assert stats["prefetch"]["disk"]["ahead_bytes"] > 0
            assert stats["ram_misses"] > 0
