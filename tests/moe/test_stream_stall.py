"""Stall of a device whose stream waits while the host goes on (as CUDA's): measured.

In virtual time, so values are compared, not only signs: the time that the device had nothing to do, and the link's.
"""

from __future__ import annotations

import pytest
from makers import TinyExperts, make_tiny_experts
from test_overlap import DEEP, EXPERT_S, NUM_EXPERTS, decode
from virtual_device import Machine, open_engine

from offmoe.prefetch.controller import PrefetchMode

SLOTS = 96
LINK = 0.1


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> TinyExperts:
    folder = tmp_path_factory.mktemp("deep")
    return make_tiny_experts(folder, layout="aligned", num_layers=DEEP, num_experts=NUM_EXPERTS)


def queued(**options: float) -> Machine:
    return Machine(link=LINK, device_slots=SLOTS, computes=False, blocking=False, attention_s=EXPERT_S, **options)


@pytest.mark.parametrize("prefetch", ["off", 1])
def test_the_stall_is_the_time_that_the_device_has_nothing_to_do(deep: TinyExperts, prefetch: PrefetchMode) -> None:
    with open_engine(deep, queued(), prefetch=prefetch) as engine:
        seconds = engine.run(decode(12, stay=0.5))
        engine.executor.read_stalls()
        idle_s = seconds - engine.machine.device.busy_s
        assert idle_s > 0.5 * seconds, "the link is the bottleneck"
        assert engine.two.cache.counters.link_stall_ns / 1e9 == pytest.approx(idle_s, rel=1e-3)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_host_that_does_not_wait_learns_the_same_share_that_stood_still(deep: TinyExperts, blocking: bool) -> None:
    shape = queued()
    shape.blocking = blocking
    with open_engine(deep, shape, prefetch=1) as engine:
        seconds = engine.run(decode(60, stay=0.5, accuracy=0.0))
        assert engine.machine.link.busy_s / seconds > 0.9
        assert engine.prefetcher is not None and 0.7 < engine.prefetcher.busy <= 1


@pytest.mark.parametrize("predict", [1, 20])
def test_predicting_that_takes_long_is_given_up_and_what_is_free_costs_nothing(deep: TinyExperts, predict: int) -> None:
    """`predict`: as long as so many experts. The device has five to compute, and then waits for the link."""
    seconds = []
    for prefetch in ("off", "auto"):
        with open_engine(deep, queued(predict_s=predict * EXPERT_S), prefetch=prefetch) as engine:  # type: ignore[arg-type]
            seconds.append(engine.run(decode(160, stay=0.3, accuracy=0.8)))
    assert seconds[1] <= 1.03 * seconds[0], f"{seconds=}"
