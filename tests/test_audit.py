"""The books of prefetching: what is counted where, and that it adds up."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from offmoe.prefetch.audit import RATE_WINDOW_BYTES, Audit, DemandRate, LayerAudit


def test_shares_of_nothing_are_zero() -> None:
    layer = LayerAudit()
    assert (layer.recall, layer.coverage, layer.accuracy) == (0.0, 0.0, 0.0)


def test_shares() -> None:
    audit = Audit()
    audit.called(3, predicted=4, needed=8, named=2, covered=1, behind_bytes=0)
    audit.started(3, 100)
    audit.started(3, 100)
    audit.started(3, 100)
    audit.used(3, 100, late=False, waited_ns=0)
    audit.wasted(3, 100)
    layer = audit.layer(3)
    assert (layer.recall, layer.coverage, layer.accuracy) == (0.25, 0.125, 0.5)
    assert (layer.pending, layer.pending_bytes) == (1, 100)


def test_what_is_hidden_is_the_demand_time_less_the_wait() -> None:
    audit = Audit()
    audit.rate.observe(1000, 5000)
    audit.used(0, 100, late=False, waited_ns=0)
    assert audit.layer(0).hidden_ns == 500
    audit.used(0, 100, late=True, waited_ns=200)
    assert audit.layer(0).hidden_ns == 800
    audit.used(0, 100, late=True, waited_ns=900)  # worse than none
    assert audit.layer(0).hidden_ns == 400
    assert audit.layer(0).waited_ns == 1100 and audit.layer(0).late == 2


def test_the_rate_is_the_given_one_until_something_was_fetched_on_demand() -> None:
    rate = DemandRate(0.25)
    assert rate.ns_per_byte == 0.25
    rate.observe(1000, 500)
    assert rate.ns_per_byte == 0.5


def test_the_rate_follows_a_link_that_became_slower() -> None:
    rate = DemandRate()
    for _ in range(20):
        rate.observe(RATE_WINDOW_BYTES // 8, RATE_WINDOW_BYTES // 8)
    for _ in range(80):
        rate.observe(RATE_WINDOW_BYTES // 8, RATE_WINDOW_BYTES)
    assert 7.9 < rate.ns_per_byte <= 8.0


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["used", "wasted", "cancelled"]), st.integers(1, 9))))
def test_started_is_what_was_used_wasted_cancelled_or_is_pending(events: list[tuple[int, str, int]]) -> None:
    audit = Audit()
    for layer_idx, end, num_bytes in events:
        audit.started(layer_idx, num_bytes)
        audit.started(layer_idx, num_bytes)
        if end == "used":
            audit.used(layer_idx, num_bytes, late=False, waited_ns=0)
        else:
            getattr(audit, end)(layer_idx, num_bytes)
    total = audit.total()
    assert total.pending == len(events) and total.pending_bytes == sum(num_bytes for *_, num_bytes in events)


def test_as_dict_is_json_with_the_whole_and_each_layer() -> None:
    audit = Audit()
    audit.called(1, predicted=3, needed=3, named=1, covered=0, behind_bytes=7)
    audit.called(0, predicted=3, needed=3, named=2, covered=0, behind_bytes=0)
    audit.spent_predicting(0, 1000)
    told = json.loads(json.dumps(audit.as_dict()))
    assert list(told["layers"]) == ["0", "1"]
    assert told["total"]["named"] == 3 and told["total"]["recall"] == 0.5 and told["total"]["behind_bytes"] == 7
    assert told["layers"]["0"]["predict_ns"] == 1000
