"""Prefetching is compared with doing nothing: never dear where it does not pay, on where it does. Virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prefetch_fakes import EXPERT_BYTES, fates
from prefetch_world import Shape, World

from offmoe.online.ab_test import ABTest
from offmoe.prefetch.controller import PrefetchController, PrefetchMode

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
    shape: Shape, mode: PrefetchMode, num_passes: int, *, furthest: int = 1
) -> tuple[float, PrefetchController]:
    world = World(replace(shape))
    prefetcher = PrefetchController(world.cache, budget_bytes=BUDGET, mode=mode, furthest=furthest)
    return world.run(prefetcher, num_passes), prefetcher


@pytest.mark.parametrize("world", BAD_WORLDS)
def test_where_it_does_not_pay_auto_costs_less_than_two_percent(world: str) -> None:
    off_s, _ = seconds(BAD_WORLDS[world], "off", NUM_PASSES)
    auto_s, prefetcher = seconds(BAD_WORLDS[world], "auto", NUM_PASSES)
    assert auto_s <= 1.02 * off_s, f"{auto_s / off_s=} {prefetcher!r}"


def test_two_distances_cost_no_more() -> None:
    shape = BAD_WORLDS["predicting takes twice the time of a layer"]
    off_s, _ = seconds(shape, "off", NUM_PASSES)
    auto_s, prefetcher = seconds(shape, "auto", NUM_PASSES, furthest=2)
    assert auto_s <= 1.02 * off_s, f"{auto_s / off_s=} {prefetcher!r}"


@pytest.mark.parametrize("world", GOOD_WORLDS)
def test_where_the_link_is_the_bottleneck_and_has_idle_time_it_is_15_percent_faster(world: str) -> None:
    off_s, _ = seconds(GOOD_WORLDS[world], "off", 800)
    auto_s, prefetcher = seconds(GOOD_WORLDS[world], "auto", 800)
    assert off_s >= 1.15 * auto_s, f"{off_s / auto_s=} {prefetcher!r}"
    useful, wasted = fates(prefetcher)
    assert useful > 0.7 * (useful + wasted)


def test_it_is_on_again_when_it_pays_at_last() -> None:
    shape = Shape(num_slots=12, predict_s=1e-3, drift={200: {"predict_s": 0.0}})
    trial = ABTest((0, 1))
    world = World(shape)
    prefetcher = PrefetchController(world.cache, budget_bytes=BUDGET, trial=trial)
    world.run(prefetcher, 200)
    assert trial.num_comparisons and trial.choice == 0
    world.run(prefetcher, 2000)
    assert trial.choice == 1, f"{trial!r} {prefetcher!r}"
