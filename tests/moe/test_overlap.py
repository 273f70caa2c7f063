"""Copies, experts and attention overlap: the real parts in virtual time, to the last bit.

Bounds are computed from a trace alone: what its misses take on the link, what its experts take on the device.

Shapes: T tokens, K experts a token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from executor_cases import MATH
from inline_copier import InlineCopier
from makers import TinyExperts, make_tiny_experts
from two_tiers import open_two_tiers
from virtual_device import DEVICE_SPEED, EXPERT_BYTES, Engine, Machine, Pass, make_pass, open_engine

from offmoe.moe.executor import Executor
from offmoe.placement.choose import PlacementMode
from offmoe.prefetch.controller import PrefetchMode

NUM_EXPERTS, TOP_K = 16, 4
DEEP, SHALLOW = 24, 4
EXPERT_S = EXPERT_BYTES / DEVICE_SPEED
RATIOS = [0.2, 0.5, 1.0]
DEVICES = pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "queued"])


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> TinyExperts:
    """Enough layers that the first one, which nobody foresees, counts for little. Slots of RAM and device are equally
    aligned: the last bits of float32 products depend on that.
    """
    folder = tmp_path_factory.mktemp("deep")
    return make_tiny_experts(folder, layout="aligned", num_layers=DEEP, num_experts=NUM_EXPERTS)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> TinyExperts:
    """Few layers: many token passes in little time."""
    return make_tiny_experts(tmp_path_factory.mktemp("shallow"), num_layers=SHALLOW, num_experts=NUM_EXPERTS)


@cache
def prefill(num_passes: int, *, num_tokens: int = 64) -> list[Pass]:
    """Every layer of which touches all experts."""
    generator = torch.Generator().manual_seed(0)
    passes = []
    for seed in range(num_passes):
        rows = [[torch.randperm(NUM_EXPERTS, generator=generator) for _ in range(num_tokens)] for _ in range(DEEP)]
        ids = [torch.stack(layer)[:, :TOP_K] for layer in rows]
        assert all(len(ids_TK.unique()) == NUM_EXPERTS for ids_TK in ids)
        passes.append(make_pass(ids, ids, seed))
    return passes


@cache
def decode(
    num_passes: int, *, num_layers: int = DEEP, stay: float = 0.0, accuracy: float = 1.0, skew: float = 0.0
) -> list[Pass]:
    """One token each. `stay`: chance to keep an expert of the token before. `accuracy`: of what is guessed.
    `skew`: exponent of how unevenly experts are liked.
    """
    source = random.Random(1)
    liked = [[(1 + rank) ** -skew for rank in range(NUM_EXPERTS)] for _ in range(num_layers)]
    for weights in liked:
        source.shuffle(weights)
    last: list[list[int]] = [[] for _ in range(num_layers)]
    passes = []
    for seed in range(num_passes):
        for layer_idx, weights in enumerate(liked):
            chosen = [expert for expert in last[layer_idx] if source.random() < stay]
            while len(chosen) < TOP_K:
                expert = source.choices(range(NUM_EXPERTS), weights)[0]
                if expert not in chosen:
                    chosen.append(expert)
            last[layer_idx] = chosen
        guesses = [
            [expert if source.random() < accuracy else source.randrange(NUM_EXPERTS) for expert in chosen]
            for chosen in last
        ]
        passes.append(make_pass([torch.tensor([ids]) for ids in last], [torch.tensor([ids]) for ids in guesses], seed))
    return passes


@cache
def mixed() -> list[Pass]:
    """Tokens, a prompt, and tokens after it."""
    return [*decode(8, stay=0.3, accuracy=0.7), *prefill(1), *decode(4, stay=0.3, accuracy=0.7)]


# By the passes, which their makers keep.
_plain: dict[int, list[torch.Tensor]] = {}


def plain_outputs(tiny: TinyExperts, passes: Sequence[Pass], device_slots: int) -> list[torch.Tensor]:
    """What comes out where every copy is made at once, and nothing is fetched ahead or computed elsewhere."""
    if id(passes) in _plain:
        return _plain[id(passes)]
    outputs = _plain[id(passes)] = []
    num_experts = DEEP * NUM_EXPERTS
    with open_two_tiers(tiny, InlineCopier(), host_slots=num_experts, device_slots=device_slots) as two:
        executor = Executor(two.cache)
        for each in passes:
            for layer_idx, ids_TK in enumerate(each.ids):
                outputs.append(executor.run_layer(layer_idx, MATH, NUM_EXPERTS, each.x_TD, ids_TK, each.weights_TK))
    return outputs


def bound_s(tiny: TinyExperts, passes: Sequence[Pass], shape: Machine) -> tuple[float, float]:
    """Seconds that a trace keeps the link and the device busy: misses of an LRU cache, experts, attention."""
    with open_engine(tiny, replace(shape, computes=False)) as engine:
        engine.run(passes)
        num_copies = engine.two.cache.counters.link_copies
    num_experts = sum(len(ids_TK.unique()) for each in passes for ids_TK in each.ids)
    num_calls = sum(len(each.ids) for each in passes)
    return num_copies * EXPERT_S / shape.link, num_experts * EXPERT_S + num_calls * shape.attention_s


def check_overlap(tiny: TinyExperts, passes: Sequence[Pass], shape: Machine, prefetch: PrefetchMode) -> None:
    copy_s, compute_s = bound_s(tiny, passes, shape)
    with open_engine(tiny, shape, prefetch=prefetch) as engine:
        seconds = engine.run(passes)
        engine.check_slots()
        assert seconds <= 1.10 * max(copy_s, compute_s), f"{seconds=} {copy_s=} {compute_s=}"
        expected = plain_outputs(tiny, passes, shape.device_slots)
        assert all(torch.equal(*pair) for pair in zip(engine.outputs, expected, strict=True))


# --- time against the larger of copy time and compute time


@DEVICES
@pytest.mark.parametrize(("device_slots", "attention"), [(96, 0), (192, 8)])
@pytest.mark.parametrize("ratio", RATIOS)
def test_a_prefill_takes_the_larger_of_copying_and_computing(
    deep: TinyExperts, ratio: float, device_slots: int, attention: int, blocking: bool
) -> None:
    """`attention`: as long as so many experts."""
    shape = Machine(link=ratio, device_slots=device_slots, attention_s=attention * EXPERT_S, blocking=blocking)
    check_overlap(deep, prefill(2), shape, "auto")


@DEVICES
@pytest.mark.parametrize("attention", [0, 1])
@pytest.mark.parametrize("ratio", RATIOS)
def test_decoding_that_misses_nearly_everything_takes_the_larger_of_copying_and_computing(
    deep: TinyExperts, ratio: float, attention: int, blocking: bool
) -> None:
    shape = Machine(link=ratio, device_slots=60, attention_s=attention * EXPERT_S, blocking=blocking)
    check_overlap(deep, decode(8), shape, 1)


@DEVICES
@pytest.mark.parametrize("attention", [0, 1])
@pytest.mark.parametrize("ratio", RATIOS)
def test_decoding_with_hits_takes_the_larger_of_copying_and_computing(
    deep: TinyExperts, ratio: float, attention: int, blocking: bool
) -> None:
    """Some layers miss nothing, others everything. Where copying and computing take equally long only a second layer
    ahead evens that out (at ratio 0.5 11 to 16% over the bound with one layer, 9% with two).
    """
    shape = Machine(link=ratio, device_slots=96, attention_s=attention * EXPERT_S, blocking=blocking)
    check_overlap(deep, decode(8, stay=0.3), shape, 2)


# --- the same bits


@DEVICES
@pytest.mark.parametrize("miss", list(PlacementMode))
@pytest.mark.parametrize("prefetch", ["off", "auto", 1, 2])
def test_outputs_are_those_without_overlap(
    deep: TinyExperts, prefetch: PrefetchMode, miss: PlacementMode, blocking: bool
) -> None:
    passes = mixed()
    shape = Machine(link=0.1, cpu=0.2, device_slots=72, attention_s=2 * EXPERT_S, blocking=blocking)
    with open_engine(deep, shape, prefetch=prefetch, miss=miss) as engine:
        engine.run(passes)
        engine.check_slots()
        expected = plain_outputs(deep, passes, shape.device_slots)
        assert all(torch.equal(*pair) for pair in zip(engine.outputs, expected, strict=True))


# --- misses


def placed_s(tiny: TinyExperts, ratio: float, miss: PlacementMode, error: float = 1.0) -> float:
    """Seconds of 2400 layer calls of skewed routing, with a link of `ratio` times the CPU's bandwidth."""
    shape = Machine(link=ratio / 4, cpu=1 / 4, device_slots=96, attention_s=EXPERT_S, computes=False, blocking=False)
    with open_engine(tiny, shape, miss=miss, error=error) as engine:
        return engine.run(decode(100, stay=0.5, skew=1.0))


def served_by_the_cpu(
    tiny: TinyExperts, miss: PlacementMode, *, skew: float, num_passes: int = 150
) -> tuple[float, float, float]:
    """Seconds, hit rate of the last third, and experts copied for each that was missed, from an empty device."""
    shape = Machine(link=0.125, cpu=0.25, device_slots=24, attention_s=EXPERT_S, computes=False, blocking=False)
    passes = decode(num_passes, num_layers=SHALLOW, skew=skew)
    with open_engine(tiny, shape, miss=miss) as engine:
        counters = engine.two.cache.counters
        seconds = engine.run(passes[: -num_passes // 3])
        before = counters.copy()
        seconds += engine.run(passes[-num_passes // 3 :])
        return seconds, counters.copy().minus(before).hit_rate, counters.link_copies / counters.misses


def test_the_device_adapts_though_the_cpu_serves(shallow: TinyExperts) -> None:
    """Experts that are used far more often than others come to the device, and stay."""
    _, stream_hits, _ = served_by_the_cpu(shallow, PlacementMode.STREAM, skew=1.0)
    _, cpu_hits, copied = served_by_the_cpu(shallow, PlacementMode.CPU, skew=1.0)
    assert cpu_hits > stream_hits and copied < 0.1, f"{cpu_hits=} {stream_hits=} {copied=}"


def test_where_all_experts_are_used_alike_next_to_nothing_is_copied(shallow: TinyExperts) -> None:
    _, _, copied = served_by_the_cpu(shallow, PlacementMode.CPU, skew=0.0)
    assert copied < 0.05, f"{copied=}"


@pytest.mark.parametrize("ratio", RATIOS)
def test_auto_is_never_far_behind_the_best_fixed_place_of_misses(deep: TinyExperts, ratio: float) -> None:
    seconds = {miss: placed_s(deep, ratio, miss) for miss in PlacementMode}
    assert seconds[PlacementMode.AUTO] <= 1.03 * min(seconds[PlacementMode.STREAM], seconds[PlacementMode.CPU]), (
        f"{seconds=}"
    )


@pytest.mark.parametrize("error", [1.2, 0.8])
@pytest.mark.parametrize("ratio", [RATIOS[0], RATIOS[-1]])
def test_auto_is_not_far_behind_where_costs_are_wrong_by_a_fifth(deep: TinyExperts, ratio: float, error: float) -> None:
    """Told the same wrong costs as the fixed choice: admission believes them, too."""
    seconds = {miss: placed_s(deep, ratio, miss, error) for miss in PlacementMode}
    assert seconds[PlacementMode.AUTO] <= 1.05 * min(seconds[PlacementMode.STREAM], seconds[PlacementMode.CPU]), (
        f"{seconds=}"
    )


# --- prefetching


def off_over_auto(tiny: TinyExperts, passes: Sequence[Pass], shape: Machine) -> float:
    """How many times faster prefetch=auto is than prefetch=off."""
    seconds = {}
    for prefetch in ("off", "auto"):
        with open_engine(tiny, replace(shape, computes=False), prefetch=prefetch) as engine:
            seconds[prefetch] = engine.run(passes)
    return seconds["off"] / seconds["auto"]


@DEVICES
@pytest.mark.parametrize(
    ("accuracy", "link", "attention"),
    [(0.0, 0.5, 4), (0.0, 0.1, 1), (0.3, 0.1, 0.5), (0.8, 0.1, 0.5)],
    ids=["useless guesses", "useless guesses, busy link", "poor guesses, busy link", "good guesses, busy link"],
)
def test_prefetching_never_costs_two_percent(
    shallow: TinyExperts, accuracy: float, link: float, attention: float, blocking: bool
) -> None:
    shape = Machine(link=link, device_slots=24, attention_s=attention * EXPERT_S, blocking=blocking)
    assert off_over_auto(shallow, decode(600, num_layers=SHALLOW, stay=0.3, accuracy=accuracy), shape) >= 0.98


@DEVICES
def test_prefetching_gains_15_percent_where_the_link_is_the_bottleneck_and_idle(
    shallow: TinyExperts, blocking: bool
) -> None:
    shape = Machine(link=0.3, device_slots=24, attention_s=8 * EXPERT_S, blocking=blocking)
    assert off_over_auto(shallow, decode(600, num_layers=SHALLOW, stay=0.3, accuracy=0.8), shape) >= 1.15


# --- both at once


def passes_compared_twice(engine: Engine, passes: Sequence[Pass]) -> int:
    """Token passes after which both the scheduler and the prefetcher were comparing."""
    assert engine.scheduler is not None and engine.prefetcher is not None and engine.prefetcher.trial is not None
    seen = []
    for each in passes:
        engine.run_pass(each)
        seen.append((engine.scheduler.trial.is_comparing, engine.prefetcher.trial.is_comparing))
    assert any(misses for misses, _ in seen) and any(ahead for _, ahead in seen)
    return sum(misses and ahead for misses, ahead in seen)


@pytest.mark.parametrize("take_turns", [True, False])
def test_misses_and_prefetching_compare_one_at_a_time(shallow: TinyExperts, take_turns: bool) -> None:
    passes = decode(500, num_layers=SHALLOW, stay=0.5, skew=0.7, accuracy=0.8)
    shape = Machine(link=0.25, cpu=0.5, device_slots=24, attention_s=4 * EXPERT_S, computes=False, blocking=False)
    with open_engine(shallow, shape, prefetch="auto", miss=PlacementMode.AUTO, take_turns=take_turns) as engine:
        assert (passes_compared_twice(engine, passes) == 0) == take_turns


@pytest.mark.parametrize("ratio", RATIOS)
def test_both_on_auto_are_never_far_behind_the_best_of_all_fixed(shallow: TinyExperts, ratio: float) -> None:
    passes = decode(400, num_layers=SHALLOW, stay=0.5, skew=0.7, accuracy=0.8)
    shape = Machine(link=0.5 * ratio, cpu=0.5, device_slots=24, attention_s=4 * EXPERT_S, computes=False)
    fixed_s = []
    for miss in (PlacementMode.STREAM, PlacementMode.CPU):
        for prefetch in ("off", 1):
            with open_engine(shallow, shape, prefetch=prefetch, miss=miss) as engine:
                fixed_s.append(engine.run(passes))
    with open_engine(shallow, shape, prefetch="auto", miss=PlacementMode.AUTO) as engine:
        seconds = engine.run(passes)
    assert seconds <= 1.05 * min(fixed_s), f"{seconds=} {fixed_s=}"


def test_deterministic(shallow: TinyExperts) -> None:
    shape = Machine(link=0.25, cpu=0.5, device_slots=24, attention_s=EXPERT_S, computes=False)
    seconds = set()
    for _ in range(2):
        with open_engine(shallow, shape, prefetch="auto", miss=PlacementMode.AUTO) as engine:
            seconds.add(engine.run(decode(60, num_layers=SHALLOW, accuracy=0.5)))
    assert len(seconds) == 1
