"""What the lookahead asks for: from which state, in which order, when not at all.

Shapes: T tokens, D model width, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
import torch
from families import build
from hypothesis import given
from hypothesis import strategies as st

from offmoe.hf.internals import experts_modules
from offmoe.prefetch.lookahead import Lookahead, Predictor, RouterGuess, rank_experts
from offmoe.routers.routing import map_routing

NUM_LAYERS, NUM_EXPERTS = 4, 10


@dataclass
class Asked:
    """A prefetcher that writes down what it is told."""

    far: int = 3
    wants: list[tuple[int, list[int], int, bool]] = field(default_factory=list)
    spoken: list[tuple[int, set[int]]] = field(default_factory=list)
    sure: list[int | None] = field(default_factory=list)
    pumps: int = 0

    def is_on(self, distance: int = 1) -> bool:
        return distance <= self.far

    def request(
        self, layer_idx: int, expert_ids: Iterable[int], *, distance: int, whole_layer: bool = False,
        num_sure: int | None = None,
    ) -> None:  # fmt: skip
        self.sure.append(num_sure)
        self.wants.append((layer_idx, list(expert_ids), distance, whole_layer))

    def router_spoke(self, layer_idx: int, expert_ids: Iterable[int]) -> None:
        self.spoken.append((layer_idx, set(expert_ids)))

    def pump(self) -> None:
        self.pumps += 1


class Router:
    """Answers with the same ids for every token, and counts how often it was asked."""

    def __init__(self, *ids: int) -> None:
        self.ids, self.calls = list(ids), 0

    def __call__(self, state_TD: torch.Tensor) -> torch.Tensor | None:
        self.calls += 1
        return torch.tensor([self.ids] * len(state_TD), device=state_TD.device)


def look(
    asked: Asked, *, routers: list[Router] | None = None, order: Iterable[int] = range(NUM_LAYERS), distance: int = 1,
    predictions: list[RouterGuess] | None = None,
) -> Lookahead:  # fmt: skip
    predictors: list[Predictor | None] = list(routers or [Router(i, 9 - i) for i in range(NUM_LAYERS)])
    return Lookahead(
        predictors, asked, order=list(order), num_experts=[NUM_EXPERTS] * NUM_LAYERS, distance=distance,
        predictions=None if predictions is None else predictions.append,
    )  # fmt: skip


def reach(ahead: Lookahead, layer_idx: int, state_TD: torch.Tensor) -> None:
    """The layer has its state and has started its own fetches."""
    ahead.observe_state(layer_idx, state_TD)
    ahead.look(layer_idx)


def state(num_tokens: int = 1, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(num_tokens, 6, device=device)


def test_a_state_asks_the_next_layers_router() -> None:
    asked, told = Asked(), list[RouterGuess]()
    ahead = look(asked, predictions=told)
    ahead.observe_state(1, state())
    assert asked.wants == []  # layer 1's own fetches come first
    ahead.look(1)
    ahead.look(1)
    assert asked.wants == [(2, [2, 7], 1, False)]
    assert told == [RouterGuess(2, (2, 7), 1, False)]


@pytest.mark.parametrize(("distance", "targets"), [(1, [3]), (2, [3, 1]), (3, [3, 1, 2])])
def test_layers_are_counted_as_they_run(distance: int, targets: list[int]) -> None:
    asked = Asked()
    reach(look(asked, order=[0, 3, 1, 2], distance=distance), 0, state())
    assert [(layer, distance) for layer, _, distance, _ in asked.wants] == list(zip(targets, [1, 2, 3], strict=False))


def test_nothing_comes_after_the_last_layer() -> None:
    asked = Asked()
    reach(look(asked, distance=3), NUM_LAYERS - 1, state())
    assert asked.wants == []


def test_the_layers_input_asks_its_own_router_again_and_starts_at_once() -> None:
    asked = Asked()
    ahead = look(asked)
    ahead.observe_input(2, state())
    assert asked.wants == [(2, [2, 7], 0, False)] and asked.pumps == 1
    ahead.observe_input(3, state(1, "meta"))
    assert not ahead.pending() and len(asked.wants) == 1


def test_a_distance_that_is_off_costs_no_router_call() -> None:
    asked, routers = Asked(far=1), [Router(0), Router(1), Router(2), Router(3)]
    ahead = look(asked, routers=routers, distance=2)
    reach(ahead, 0, state())
    assert [router.calls for router in routers] == [0, 1, 0, 0]
    asked.far = 2
    reach(ahead, 0, state())
    assert [router.calls for router in routers] == [0, 2, 1, 0]


def test_a_layer_without_predictor_is_left_alone() -> None:
    asked = Asked()
    ahead = Lookahead([None, lambda state_TD: None], asked, order=[0, 1], num_experts=[4, 4])
    reach(ahead, 0, state())
    assert asked.wants == []
    assert repr(ahead) == "<Lookahead [1 of 2 layers predicted, 0 pending]>"


def test_a_prefill_that_touches_nearly_all_wants_whole_layers_and_asks_no_router() -> None:
    asked, routers = Asked(), [Router(0), Router(1), Router(2), Router(3)]
    ahead = look(asked, routers=routers)
    for layer_idx in (0, 1):
        ahead.observe_state(layer_idx, state(64))
        ahead.router_spoke(layer_idx, range(9))  # 9 of 10
        ahead.look(layer_idx)
    everything = list(range(NUM_EXPERTS))
    assert asked.wants == [(1, everything, 1, True), (2, everything, 1, True)]
    assert not any(router.calls for router in routers)


def test_what_a_prefill_touched_says_nothing_of_the_token_after_it() -> None:
    asked = Asked()
    ahead = look(asked)
    ahead.observe_state(3, state(64))
    ahead.router_spoke(3, range(10))
    ahead.look(3)
    reach(ahead, 0, state(1))
    assert [whole for *_, whole in asked.wants] == [False]


def test_a_short_prompt_wants_the_union() -> None:
    asked = Asked()
    ahead = look(asked)
    ahead.observe_state(0, state(5))
    ahead.router_spoke(0, range(8))  # 8 of 10
    reach(ahead, 1, state(5))
    assert asked.wants[-1] == (2, [2, 7], 1, False)


def test_on_a_device_ids_wait_for_the_executors_own_copy() -> None:
    """The meta device stands for one whose numbers the host cannot read: nothing here tries."""
    asked = Asked()
    ahead = look(asked, distance=2)
    ahead.observe_state(0, state(3, "meta"))
    assert asked.wants == []
    assert {layer: (ids.shape, ids.device.type) for layer, ids in ahead.pending().items()} == {
        1: ((3, 2), "meta"), 2: ((3, 2), "meta")
    }  # fmt: skip
    ahead.take(1, [[4, 5], [5, 6], [5, 4]])
    assert asked.wants == [(1, [5, 4, 6], 1, False)]
    assert list(ahead.pending()) == [2]
    ahead.router_spoke(2, [1])  # it has spoken for itself
    assert not ahead.pending()


def test_a_call_that_was_broken_off_leaves_nothing_to_ask_or_to_take() -> None:
    asked = Asked()
    ahead = look(asked)
    ahead.observe_state(0, state(1, "meta"))
    ahead.observe_state(1, state())
    ahead.reset()
    ahead.look(1)
    assert not ahead.pending()
    assert asked.wants == []


def test_asleep_it_looks_at_nothing() -> None:
    asked = Asked()
    ahead = look(asked)
    ahead.sleep()
    reach(ahead, 0, state())
    assert asked.wants == []
    ahead.reset()
    reach(ahead, 0, state())
    assert asked.wants


def test_the_routers_choice_is_passed_on() -> None:
    asked = Asked()
    look(asked).router_spoke(1, [3, 3, 5])
    assert asked.spoken == [(1, {3, 5})]


def test_one_tokens_experts_keep_the_routers_order_and_padding_is_dropped() -> None:
    assert rank_experts([[7, 2, 10, -1, 5]], 10) == [7, 2, 5]


def test_many_tokens_rank_by_count_then_by_choice_then_by_number() -> None:
    assert rank_experts([[1, 2], [3, 2], [4, 5]], 10) == [2, 1, 3, 4, 5]
    assert rank_experts([], 10) == []


@given(st.lists(st.lists(st.integers(-1, 12), min_size=3, max_size=3), max_size=12))
def test_ranking_names_each_touched_expert_once(ids_TK: list[list[int]]) -> None:
    ranked = rank_experts(ids_TK, NUM_EXPERTS)
    flat = [idx for row in ids_TK for idx in row if 0 <= idx < NUM_EXPERTS]
    assert sorted(ranked) == sorted(set(flat))
    assert [flat.count(idx) for idx in ranked] == sorted(map(flat.count, ranked), reverse=True)


def test_over_a_real_model() -> None:
    """Hooks, predictors and lookahead together: every layer but the first is asked for twice, and rightly at last."""
    model, asked = build("deepseek_v4"), Asked()
    found = map_routing(model)
    ahead = Lookahead(found.predictors, asked, order=found.order, num_experts=[8] * len(found.layers))
    hooks = found.install(ahead)
    for layer_idx, (_, module) in enumerate(experts_modules(model)):  # where the executor would be
        module.register_forward_pre_hook(lambda *_, layer_idx=layer_idx: ahead.look(layer_idx))
    with torch.no_grad():
        model(input_ids=torch.tensor([[17]]))
    hooks.remove()
    asked_for = [(layer, distance) for layer, _, distance, _ in asked.wants]
    assert asked_for == [(0, 0), (1, 1), (1, 0), (2, 1), (2, 0), (3, 1), (3, 0)]
    assert all(len(set(ids)) == 2 for _, ids, _, _ in asked.wants)
