"""Admission: bytes are paced, the pace follows from what became of the copies."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from test_arbiter import EXPERT_BYTES, costs_of, speeds_of

from offmoe.base.keys import ExpertKey
from offmoe.executor.admission import BURST, HOPED_SHARE, MAX_SHARE, MIN_SHARE, Admission


@given(st.lists(st.tuples(st.floats(0, 0.1), st.integers(0, 8), st.booleans())))
def test_admitted_bytes_are_paced(calls: list[tuple[float, int, bool]]) -> None:
    admission, costs = Admission(expert_bytes=EXPERT_BYTES), costs_of(speeds_of(0.5))
    allowed = BURST * EXPERT_BYTES
    for idle_s, num_served, refuse in calls:
        assert MIN_SHARE <= admission.pace(costs) <= MAX_SHARE
        allowed += MAX_SHARE * idle_s * costs.link_beside_cpu_bytes_per_s
        admission.refill(idle_s, costs)
        before = admission.admitted_bytes
        admitted = admission.admit([ExpertKey(0, idx) for idx in range(num_served)], EXPERT_BYTES)
        assert admission.admitted_bytes == before + len(admitted) * EXPERT_BYTES <= allowed * (1 + 1e-9)
        for key in admitted:
            if refuse:
                admission.refused(key, EXPERT_BYTES)
            else:
                admission.used(key)
        if refuse:
            assert admission.admitted_bytes == before


def test_admission_speeds_up_when_copies_are_used_and_slows_down_when_not() -> None:
    admission, costs = Admission(expert_bytes=1), costs_of(speeds_of(0.2))
    keys = [ExpertKey(0, idx) for idx in range(4)]
    paces = []
    for fate in (admission.used, admission.wasted):
        for _ in range(200):
            admission.refill(1.0, costs)
            for key in admission.admit(keys, 1):
                fate(key)
        paces.append(admission.pace(costs))
    assert paces[0] == MAX_SHARE and paces[1] == MIN_SHARE


def test_an_expert_served_once_is_not_admitted() -> None:
    admission = Admission(expert_bytes=1)
    once, twice = ExpertKey(0, 0), ExpertKey(0, 1)
    assert admission.admit([twice], 1) == []
    assert admission.admit([once, twice], 1) == [twice]
    admission.wasted(ExpertKey(5, 5))
    assert admission.used_share == HOPED_SHARE
