"""Stall of a device whose stream waits while the host goes on (as CUDA's): measured, and booked on the right layer.

In virtual time, so values are compared, not only signs: the time that the device had nothing to do, and the link's.
"""

from __future__ import annotations

import pytest
from makers import TinyExperts, make_tiny_experts
from test_overlap import DEEP, EXPERT_S, NUM_EXPERTS, decode
from virtual_device import EXPERT_BYTES, Engine, Machine, open_engine

from offmoe.prefetch.audit import Audit
from offmoe.prefetch.switch import Mode as PrefetchMode

SLOTS = 96
LINK = 0.1
# Of a byte on a link of a tenth of the device's 1e9 bytes a second.
LINK_NS_PER_BYTE = 10.0


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> TinyExperts:
    folder = tmp_path_factory.mktemp("deep")
    return make_tiny_experts(folder, layout="aligned", num_layers=DEEP, num_experts=NUM_EXPERTS)


def audit_of(engine: Engine) -> Audit:
    assert engine.ahead is not None
    return engine.ahead.prefetcher.audit  # type: ignore[union-attr]


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
def test_a_byte_on_demand_costs_what_the_link_takes_for_it(deep: TinyExperts, blocking: bool) -> None:
    """A host that waits and one that does not learn the same rate, and the same share of time that stood still."""
    shape = queued()
    shape.blocking = blocking
    with open_engine(deep, shape, prefetch=1) as engine:
        seconds = engine.run(decode(60, stay=0.5, accuracy=0.0))
        link_share = engine.machine.link.busy_s / seconds
        audit = audit_of(engine)
        assert link_share > 0.9
        assert 0.7 * LINK_NS_PER_BYTE < audit.rate.ns_per_byte <= 1.3 * LINK_NS_PER_BYTE
        assert 0.7 < audit.busy <= 1


def test_a_late_prefetch_is_charged_what_was_waited_for_it(deep: TinyExperts) -> None:
    """Every guess is right, and comes late where attention is short."""
    with open_engine(deep, queued(), prefetch=1) as engine:
        engine.run(decode(12))
        engine.executor.read_stalls()
        total = audit_of(engine).total()
        assert total.late > 0.5 * total.useful
        # All layers but the first wait for prefetches alone.
        stall_ns = engine.two.cache.counters.link_stall_ns
        first_ns = 12 * 4 * EXPERT_BYTES * LINK_NS_PER_BYTE
        assert 0.9 * (stall_ns - first_ns) <= total.waited_ns <= stall_ns


@pytest.mark.parametrize(("predict", "is_free"), [(1, True), (20, False)])
def test_predicting_costs_only_where_the_host_was_what_everything_waited_for(
    deep: TinyExperts, predict: int, is_free: bool
) -> None:
    """`predict`: as long as so many experts. The device has five to compute, and then waits for the link."""
    with open_engine(deep, queued(predict_s=predict * EXPERT_S), prefetch="auto") as engine:
        assert engine.switch is not None
        engine.run(decode(160, stay=0.3, accuracy=0.8))
        total = audit_of(engine).total()
        hidden = total.predict_hidden_ns / total.predict_ns
        assert hidden == 1 if is_free else 0 < hidden < 0.9
        if is_free:
            assert not engine.switch.as_dict()["layers_off"], "a guess that was free never loses time here"
