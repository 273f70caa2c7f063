"""Prefetching switches itself by time and bytes: never dear where it does not pay, on where it does. Virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prefetch_fakes import EXPERT_BYTES
from prefetch_world import Shape, World

from offmoe.base.trial import Trial
from offmoe.prefetch.audit import Audit
from offmoe.prefetch.prefetcher import Prefetcher
from offmoe.prefetch.switch import FIRST_PAUSE_CALLS, WINDOW_CALLS, Mode, Switch

BUDGET = 8 * EXPERT_BYTES
NUM_PASSES = 1200
SLOW, VERY_SLOW = 1e9, 0.5e9

BAD_WORLDS = {
    "useless predictions": Shape(accuracy=0.0, num_slots=20),
    "useless, and the link is busy": Shape(accuracy=0.0, link_bytes_per_s=SLOW, num_slots=24, noise=0.2),
    "a link that is never idle": Shape(
        accuracy=0.3, link_bytes_per_s=VERY_SLOW, attention_s=0.1e-3, num_predicted=8, noise=0.3
    ),
    "predicting takes twice the time of a layer": Shape(predict_s=2e-3),
    "predicting takes a little more than it hides": Shape(predict_s=0.15e-3, noise=0.2),
    "everything is cached": Shape(num_slots=128, predict_s=0.1e-3),
    "good at first": Shape(num_slots=24, link_bytes_per_s=2 * SLOW, drift={500: {"predict_s": 2e-3}}),
}
GOOD_WORLDS = {
    "below top-k slots a layer": Shape(num_slots=12, noise=0.2),
    "a slow link": Shape(num_slots=24, link_bytes_per_s=2 * SLOW, noise=0.2),
}


def seconds(
    shape: Shape, mode: Mode, num_passes: int, *, distances: tuple[int, ...] = (1,)
) -> tuple[float, Prefetcher]:
    world = World(replace(shape))
    prefetcher = Prefetcher(world.cache, budget_bytes=BUDGET, switch=Switch(mode, distances=distances))
    return world.run(prefetcher, num_passes), prefetcher


@pytest.mark.parametrize("world", BAD_WORLDS)
def test_where_it_does_not_pay_auto_costs_less_than_two_percent(world: str) -> None:
    off_s, _ = seconds(BAD_WORLDS[world], "off", NUM_PASSES)
    auto_s, prefetcher = seconds(BAD_WORLDS[world], "auto", NUM_PASSES)
    assert auto_s <= 1.02 * off_s, f"{auto_s / off_s=} {prefetcher!r}"


def test_two_distances_cost_no_more() -> None:
    shape = BAD_WORLDS["predicting takes twice the time of a layer"]
    off_s, _ = seconds(shape, "off", NUM_PASSES)
    auto_s, prefetcher = seconds(shape, "auto", NUM_PASSES, distances=(1, 2))
    assert auto_s <= 1.02 * off_s, f"{auto_s / off_s=} {prefetcher!r}"


@pytest.mark.parametrize("world", GOOD_WORLDS)
def test_where_the_link_is_the_bottleneck_and_has_idle_time_it_is_15_percent_faster(world: str) -> None:
    off_s, _ = seconds(GOOD_WORLDS[world], "off", 800)
    auto_s, prefetcher = seconds(GOOD_WORLDS[world], "auto", 800)
    assert off_s >= 1.15 * auto_s, f"{off_s / auto_s=} {prefetcher!r}"
    assert prefetcher.audit.total().accuracy > 0.7


def test_it_is_on_again_when_it_pays_at_last() -> None:
    shape = Shape(num_slots=12, predict_s=1e-3, drift={200: {"predict_s": 0.0}})
    trial = Trial((0, 1))
    world = World(shape)
    prefetcher = Prefetcher(world.cache, budget_bytes=BUDGET, switch=Switch("auto", trial=trial))
    world.run(prefetcher, 200)
    assert trial.num_comparisons and trial.choice == 0
    world.run(prefetcher, 2000)
    assert trial.choice == 1, f"{trial!r} {prefetcher!r}"


def run_window(
    switch: Switch, num_calls: int = WINDOW_CALLS, *, audit: Audit | None = None, hidden_ns: int = 0,
    wasted_bytes: int = 0, behind_bytes: int = 0, predict_ns: int = 0,
) -> None:  # fmt: skip
    """Calls of layer 0, each of which adds this to its books."""
    audit = audit or Audit(ns_per_byte=1.0)
    layer = audit.layer(0)
    for _ in range(num_calls):
        layer.hidden_ns += hidden_ns
        layer.wasted_bytes += wasted_bytes
        layer.behind_bytes += behind_bytes
        layer.predict_ns += predict_ns
        switch.layer_called(0, audit)


def make_switch() -> Switch:
    """On, and never comparing."""
    trial = Trial((1, 0), first_after=10**9)
    return Switch("auto", trial=trial)


@pytest.mark.parametrize(
    ("hidden_ns", "wasted_bytes", "behind_bytes", "predict_ns", "stays_on"),
    [
        (100, 90, 90, 0, True),
        (100, 110, 110, 0, False),  # each wasted byte was in the place of a useful one
        (100, 500, 0, 0, True),  # the link had time for them
        (100, 900, 0, 0, False),  # the slots had not
        (100, 0, 0, 110, False),
        (0, 0, 0, 0, True),
        (-1, 0, 0, 0, False),  # late ones were waited for longer than a fetch takes
    ],
)
def test_a_layer_is_judged_by_time(
    hidden_ns: int, wasted_bytes: int, behind_bytes: int, predict_ns: int, stays_on: bool
) -> None:
    switch = make_switch()
    run_window(switch, hidden_ns=hidden_ns, wasted_bytes=wasted_bytes, behind_bytes=behind_bytes, predict_ns=predict_ns)
    assert switch.layer_is_on(0) is stays_on
    assert switch.layer_is_on(1)


def test_a_layer_that_loses_again_sits_out_longer() -> None:
    switch = make_switch()
    audit, pauses = Audit(), []
    for _ in range(3):
        run_window(switch, audit=audit, hidden_ns=-1)
        pauses.append(0)
        while not switch.layer_is_on(0):
            run_window(switch, 1, audit=audit)
            pauses[-1] += 1
    assert pauses == [FIRST_PAUSE_CALLS, 2 * FIRST_PAUSE_CALLS, 4 * FIRST_PAUSE_CALLS]
    assert switch.as_dict() == {"mode": "auto", "distance": 1, "layers_off": []}


def test_no_verdict_changes_while_the_whole_is_compared() -> None:
    trial = Trial((1, 0), first_after=1)
    switch = Switch("auto", trial=trial)
    switch.pass_ended(1.0, num_tokens=1)
    run_window(switch, 2 * WINDOW_CALLS, hidden_ns=-1)
    verdicts = [(trial.is_comparing, switch.layer_is_on(0))]
    for _ in range(40):
        switch.pass_ended(3.0 if switch.distance == 0 else 1.0, num_tokens=1)
        verdicts.append((trial.is_comparing, switch.layer_is_on(0)))
    assert set(verdicts) == {(True, True), (False, False)}


def test_a_prefill_is_no_observation() -> None:
    switch = Switch("auto", trial=(trial := Trial((0, 1))))
    switch.pass_ended(100.0, num_tokens=512)
    assert trial.total_s == 0


@pytest.mark.parametrize(("mode", "allowed"), [("off", False), (0, False), (1, True), ("auto", True)])
def test_whole_layers_are_the_users_word(mode: Mode, allowed: bool) -> None:
    switch = Switch(mode)
    assert switch.allows_whole_layers is allowed
