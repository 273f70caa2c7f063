"""Lookahead and prefetcher together: passes of single tokens go by unwatched while the switch is off."""

from __future__ import annotations

import pytest
import torch
from prefetch_fakes import EXPERT_BYTES, FakeCache
from test_lookahead import Router, state
from virtual_machine import Speeds, VirtualMachine

from offmoe.prefetch.ahead import PrefetchCoordinator
from offmoe.prefetch.controller import PrefetchController, PrefetchMode
from offmoe.prefetch.lookahead import Lookahead

NUM_LAYERS, NUM_EXPERTS = 3, 10


@pytest.fixture
def routers() -> list[Router]:
    return [Router(layer_idx, layer_idx + 1) for layer_idx in range(NUM_LAYERS)]


def start(routers: list[Router], mode: PrefetchMode) -> PrefetchCoordinator:
    cache = FakeCache(VirtualMachine(Speeds()), num_slots=12, num_layers=NUM_LAYERS)
    prefetcher = PrefetchController(cache, budget_bytes=4 * EXPERT_BYTES, mode=mode)
    lookahead = Lookahead(routers, prefetcher, order=range(NUM_LAYERS), num_experts=[NUM_EXPERTS] * NUM_LAYERS)
    return PrefetchCoordinator(lookahead, prefetcher, order=range(NUM_LAYERS))


def run_pass(ahead: PrefetchCoordinator, *, num_tokens: int = 1, expert_ids: tuple[int, ...] = (1, 2)) -> None:
    """As the model's hooks and the executor do."""
    x_TD: torch.Tensor = state(num_tokens)
    for layer_idx in range(NUM_LAYERS):
        if not ahead.lookahead.is_asleep:
            ahead.lookahead.observe_state(layer_idx, x_TD)
        ahead.router_spoke(layer_idx, expert_ids, num_tokens)
        ahead.look(layer_idx, is_waiting=False)
        ahead.layer_ended(layer_idx)


def num_watched(ahead: PrefetchCoordinator) -> int:
    assert isinstance(ahead.prefetcher, PrefetchController)
    return ahead.prefetcher._num_calls


def test_single_tokens_are_not_watched_while_it_is_off(routers: list[Router]) -> None:
    ahead = start(routers, "auto")
    assert ahead.prefetcher.distance == 0
    run_pass(ahead)
    assert ahead.lookahead.is_asleep
    before = num_watched(ahead)
    run_pass(ahead)
    assert num_watched(ahead) == before
    assert not any(router.calls for router in routers)


def test_time_goes_on_and_a_comparison_wakes_it(routers: list[Router]) -> None:
    ahead = start(routers, "auto")
    for _ in range(40):
        run_pass(ahead)
        assert ahead.lookahead.is_asleep <= (ahead.prefetcher.distance == 0)
    trial = ahead.prefetcher.trial
    assert trial is not None
    assert trial.is_comparing or trial.num_comparisons
    assert any(router.calls for router in routers)


def test_a_prompt_is_watched(routers: list[Router]) -> None:
    """From its second layer on; where it touches all experts of a layer, the next layer is fetched as a whole."""
    ahead = start(routers, "auto")
    run_pass(ahead)
    assert ahead.lookahead.is_asleep
    before = num_watched(ahead)
    run_pass(ahead, num_tokens=20, expert_ids=tuple(range(NUM_EXPERTS)))
    assert num_watched(ahead) == before + NUM_LAYERS
    assert ahead.prefetcher.num_pending


def test_a_fixed_distance_never_sleeps(routers: list[Router]) -> None:
    ahead = start(routers, 1)
    run_pass(ahead)
    assert not ahead.lookahead.is_asleep


def test_after_a_broken_off_call_it_is_awake(routers: list[Router]) -> None:
    ahead = start(routers, "auto")
    run_pass(ahead)
    ahead.reset()
    assert not ahead.lookahead.is_asleep
