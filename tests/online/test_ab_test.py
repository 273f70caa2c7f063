"""A/B tests: finds the faster setting, loses little time, keeps still. Time is made up, noise is seeded."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmoe.online.ab_test import PATIENCE, ABTest, Turns

Cost = Callable[[str, int], float]


class Run:
    """A trial fed with made-up costs, and what really happened."""

    def __init__(self, trial: ABTest[str], cost: Cost, *, noise: float = 0.0, seed: int = 0) -> None:
        self.trial, self.cost, self.noise = trial, cost, noise
        self.random = random.Random(seed)
        self.settings: list[str] = []
        self.choices: list[str] = [trial.choice]
        self.strayed: list[bool] = []  # where the setting was not the choice
        self.total_s = self.best_s = 0.0

    def go(self, num: int, *, names: str = "ABC") -> Run:
        for _ in range(num):
            setting, work = self.trial.current, self.random.choice([1.0, 2.0, 3.0])
            jitter = self.random.lognormvariate(0.0, self.noise) if self.noise else 1.0
            costs = {name: self.cost(name, len(self.settings)) * work * jitter for name in names}
            self.strayed.append(setting != self.trial.choice)
            self.trial.observe(setting, costs[setting], work)
            self.settings.append(setting)
            self.total_s += costs[setting]
            self.best_s += min(costs.values())
            if self.trial.choice != self.choices[-1]:
                self.choices.append(self.trial.choice)
        return self


def fixed(**costs: float) -> Cost:
    return lambda name, at: costs[name]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("better", "AB")
def test_finds_the_faster_of_two_through_noise(better: str, seed: int) -> None:
    costs = {"A": 1.1, "B": 1.1, better: 1.0}
    run = Run(ABTest("AB"), fixed(**costs), noise=0.05, seed=seed).go(400, names="AB")
    assert run.trial.choice == better and run.trial.num_comparisons >= 1


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("better", "ABC")
def test_finds_the_fastest_of_three(better: str, seed: int) -> None:
    costs = {"A": 1.3, "B": 1.2, "C": 1.1, better: 1.0}
    run = Run(ABTest("ABC"), fixed(**costs), noise=0.05, seed=seed).go(400)
    assert run.trial.choice == better


def test_blocks_alternate_forwards_and_back() -> None:
    run = Run(ABTest("AB", block=2, first_after=3), fixed(A=1.0, B=1.0)).go(3 + 16, names="AB")
    assert "".join(run.settings) == "AAA" + "AABBBBAA" * 2
    run = Run(ABTest("ABC", block=1, first_after=1), fixed(A=1.0, B=1.0, C=1.0)).go(1 + 12)
    assert "".join(run.settings) == "A" + "ABCCBA" * 2


def test_equal_settings_are_left_alone() -> None:
    run = Run(ABTest("AB"), fixed(A=1.0, B=1.0)).go(3000, names="AB")
    assert run.choices == ["A"] and run.trial.lost_s == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_noise_does_not_make_it_flap(seed: int) -> None:
    run = Run(ABTest("AB"), fixed(A=1.0, B=1.0), noise=0.2, seed=seed).go(20_000, names="AB")
    assert len(run.choices) <= 3


def test_a_steady_drift_is_no_difference() -> None:
    run = Run(ABTest("AB"), lambda name, at: 1.0 + at / 500).go(3000, names="AB")
    assert run.choices == ["A"]


@pytest.mark.parametrize("seed", range(10))
def test_outliers_decide_nothing(seed: int) -> None:
    source = random.Random(seed)
    run = Run(ABTest("AB"), lambda name, at: (1.0 if name == "A" else 1.1) * (30 if source.random() < 0.02 else 1))
    assert run.go(2000, names="AB").choices == ["A"]


def test_the_hopeless_are_dropped_after_a_block() -> None:
    run = Run(ABTest("ABC", block=2), fixed(A=1.0, B=9.0, C=1.2)).go(200)
    assert run.settings.count("B") == 2
    assert run.settings.count("C") == 2 * 2 * 5


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_follows_a_change(noise: float) -> None:
    run = Run(ABTest("AB"), lambda name, at: 1.0 if (name == "A") == (at < 3000) else 1.5, noise=noise)
    run.go(20_000, names="AB")
    assert run.choices == ["A", "B"]
    assert run.settings[6000:].count("A") < 1000


@settings(max_examples=60)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 0.2), st.integers(0, 1000))
def test_little_time_is_lost_in_the_long_run(b_cost: float, c_cost: float, noise: float, seed: int) -> None:
    run = Run(ABTest("ABC"), fixed(A=1.0, B=b_cost, C=c_cost), noise=noise, seed=seed).go(8000)
    first_s = 2 * 12 * 2 * 2 * 3.0 * max(1.0, b_cost, c_cost) / min(1.0, b_cost, c_cost)
    assert run.total_s <= 1.02 * (1.01 + noise / 10) * run.best_s + first_s
    assert sum(run.strayed[2000:]) <= 0.1 * 6000


def test_comparisons_become_rare() -> None:
    run = Run(ABTest("AB"), fixed(A=1.0, B=1.02)).go(50_000, names="AB")
    early, late = run.settings[:5000].count("B"), run.settings[-20_000:].count("B")
    assert 0 < late < 0.02 * 20_000 and early > late / 4
    assert run.total_s <= 1.001 * run.best_s


def test_only_what_is_considered_is_tried() -> None:
    trial = ABTest("ABC")
    trial.consider("AC")
    assert "B" not in Run(trial, fixed(A=1.0, B=0.5, C=1.1)).go(1000).settings
    trial.consider("A")
    assert set(Run(trial, fixed(A=1.0, B=0.5, C=1.1)).go(1000).settings) == {"A"}
    trial.consider("ABC")
    assert Run(trial, fixed(A=1.0, B=0.5, C=1.1)).go(1000).trial.choice == "B"


@given(st.lists(st.tuples(st.sampled_from("AB"), st.floats(0, 1e6), st.floats(0, 1e6)), max_size=200))
def test_takes_whatever_is_observed(observations: list[tuple[str, float, float]]) -> None:
    trial = ABTest("AB", block=2, settle=1)
    for setting, seconds, work in observations:
        assert trial.current in "AB" and trial.choice in "AB"
        assert trial.is_comparing or trial.current == trial.choice
        trial.observe(setting, seconds, work)
    assert trial.lost_s <= trial.total_s * (1 + 1e-9)
    assert repr(trial).startswith("<ABTest")


def test_one_setting_is_never_compared() -> None:
    run = Run(ABTest("A"), fixed(A=1.0)).go(100, names="A")
    assert set(run.settings) == {"A"} and not run.trial.num_comparisons


def test_trials_that_share_turns_compare_one_at_a_time() -> None:
    first, second = ABTest("AB"), ABTest("AB")
    first.turns = second.turns = Turns(second)
    num_compared = [0, 0]
    for _ in range(400):
        for trial in (first, second):
            trial.observe(trial.current, 1.0 if trial.current == "A" else 1.05, 1.0)
        assert not (first.is_comparing and second.is_comparing)
        assert second.num_comparisons or second.is_comparing or not first.is_comparing
        num_compared[0] += first.is_comparing
        num_compared[1] += second.is_comparing
    assert all(num_compared)


def test_who_has_waited_long_enough_compares_all_the_same() -> None:
    stuck, waiting = ABTest("AB"), ABTest("AB", block=2, max_rounds=12, first_after=1)
    stuck.turns = waiting.turns = Turns(stuck)
    num_waited = 0
    while not waiting.is_comparing:
        waiting.observe("A", 1.0, 1.0)
        num_waited += 1
    assert num_waited == PATIENCE * 12 * 2 * 2 * 2 + 1
