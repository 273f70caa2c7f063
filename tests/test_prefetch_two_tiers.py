"""Beside a device: disk to RAM has a queue, an audit and a switch of its own, and reads while the drive is idle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import PROMPT, TINY_EXPERTS, leaves_nothing, open_tiny, save_tiny
from makers import make_tiny_experts
from two_tiers import TwoTiers, open_two_tiers

import offmoe
from offmoe.base.keys import ExpertKey
from offmoe.models import load as load_module
from offmoe.prefetch.prefetcher import Prefetcher
from offmoe.prefetch.two_tiers import BelowDevice, TwoTierPrefetcher
from offmoe.tiers.device import SimulatedDevice
from offmoe.tiers.inline import InlineCopier

HOST_SLOTS, DEVICE_SLOTS = 6, 3
FAR = ExpertKey(1, 2)


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[TwoTiers]:
    tiny = make_tiny_experts(tmp_path)
    with open_two_tiers(tiny, InlineCopier(), host_slots=HOST_SLOTS, device_slots=DEVICE_SLOTS) as opened:
        yield opened


def attach(tiers: TwoTiers, *, link: int | str = "off", disk: int | str = 3) -> TwoTierPrefetcher:
    """Both prefetchers as models/look_ahead.py makes them, with fixed settings."""
    budget_bytes = 1 << 30
    over_link = Prefetcher(tiers.cache, budget_bytes=budget_bytes, mode=link)  # type: ignore[arg-type]
    from_disk = Prefetcher(
        BelowDevice(tiers.host, tiers.cache),
        budget_bytes=budget_bytes,
        mode=disk,
        far_when_idle=True,  # type: ignore[arg-type]
    )
    tiers.cache.books.listener, tiers.host.books.listener = over_link, from_disk
    read_bytes = tiers.host.num_bytes(FAR)
    return TwoTierPrefetcher(
        over_link, from_disk, host=tiers.host, read_bytes=read_bytes, counters=tiers.cache.counters
    )


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
    both.want(FAR.layer_idx, [FAR.expert_idx], distance=1)
    both.pump()
    land(tiers)
    assert tiers.host.is_ready(FAR) and not tiers.cache.is_ready(FAR) and not tiers.cache.is_coming(FAR)
    run_layer(tiers, both, FAR.layer_idx, FAR.expert_idx)
    assert tiers.cache.is_ready(FAR)
    counters, audit = tiers.cache.counters, both.from_disk.audit.total()
    assert (counters.ram_hits, counters.ram_misses) == (1, 0)
    assert (audit.started, audit.useful, audit.wasted, audit.pending) == (1, 1, 0, 0)
    assert both.over_link.audit.total().started == 0
    tiers.assert_at_rest()


def test_a_wrong_guess_is_wasted_once_its_layer_has_spoken(tiers: TwoTiers) -> None:
    both = attach(tiers)
    both.router_spoke(0, [0])
    both.want(1, [2], distance=1)
    both.pump()
    run_layer(tiers, both, 1, 3)
    land(tiers)
    audit = both.from_disk.audit.total()
    assert (audit.started, audit.useful) == (1, 0) and audit.wasted + audit.cancelled == 1
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
    both.want(1, [2], distance=3)
    both.pump()
    assert not tiers.host.ahead_bytes and not both.from_disk.audit.total().started


def test_nothing_is_read_ahead_while_something_needed_is_read_but_it_is_while_the_link_is_waited_for(
    tiers: TwoTiers,
) -> None:
    both = attach(tiers)
    both.router_spoke(0, [0])
    needed = tiers.host.start(ExpertKey(0, 0), cold=False)
    assert needed is not None and tiers.host.is_demanded
    both.want(1, [2], distance=1)
    both.pump()
    assert not tiers.host.is_coming(FAR)
    tiers.host.finish(needed)
    tiers.host.release([needed.key])
    assert not tiers.host.is_demanded
    both.demand_begins()  # of the link
    both.pump()
    assert tiers.host.is_coming(FAR) or tiers.host.is_ready(FAR)
    both.demand_ends(100, 10)
    land(tiers)
    run_layer(tiers, both, 1, 2)


def test_what_reading_costs_is_learnt_from_the_counters_when_the_next_layer_begins(tiers: TwoTiers) -> None:
    both = attach(tiers)
    run_layer(tiers, both, 0, 0)
    tiers.cache.counters.disk_stall_ns += 5 * tiers.host.num_bytes(FAR)
    before = both.from_disk.audit.rate.ns_per_byte
    both.router_spoke(1, [3])
    assert before == 0 and both.from_disk.audit.rate.ns_per_byte >= 5
    both.reset()
    assert both.is_idle is False and both.from_disk.num_pending == 0


def test_a_near_guess_goes_to_both_where_both_are_on_and_is_charged_to_the_link(tiers: TwoTiers) -> None:
    both = attach(tiers, link=1)
    both.router_spoke(0, [0])
    both.want(1, [2], distance=1, predict_ns=7)
    both.want(2, [2], distance=2, predict_ns=9)
    assert both.is_on(1) and both.is_on(2, 3) and not attach(tiers, disk="off").is_on(2, 3)
    near, far = both.over_link.audit, both.from_disk.audit
    assert near.layer(1, 1).predict_ns == 7 and far.layer(1, 1).predict_ns == 0
    assert near.layer(2, 2).predict_ns == 0 and far.layer(2, 2).predict_ns == 9
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
        return engine.generate(PROMPT, max_new_tokens=24, temperature=0, ignore_end=True).token_ids

    with leaves_nothing():
        with open_tiny(folder, prefetch="off") as engine:
            expected = ids(engine)
        monkeypatch.setattr(load_module, "_make_device_pool", with_little_ram)
        options = {"miss": miss, "warm_start": False, "_device": SimulatedDevice(1e12)}
        with open_tiny(folder, prefetch="auto", **options) as engine:
            ahead = engine._parts.serving.ahead
            assert ahead is not None and isinstance(ahead.prefetcher, TwoTierPrefetcher)
            switch = ahead.prefetcher.from_disk.switch
            assert switch.trial is not None
            switch.trial.prefer(3)
            switch.distance = 3
            assert ids(engine) == expected
            stats = engine.stats()
            assert stats["prefetch"]["disk"]["total"]["started"] > 0
            assert stats["ram_misses"] > 0
