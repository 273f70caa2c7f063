"""Asks the routers of coming layers about the state at hand, and tells the prefetcher what they would choose.

A layer adds little to the residual stream, so the next layer's own router, given this layer's state, names most of the
experts that it will choose when its turn comes (Eliseev and Mazur, arXiv:2312.17238). Nothing here knows models or
moves bytes: predictors come from routers/routing.py, fetches are the prefetcher's.

Shapes: T tokens, K experts a token, X what a state has besides (D model width, often the only one).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

# Above this share of experts touched by the layer before, a prefill is taken to touch all, and routers are not asked.
WHOLE_LAYER_SHARE = 0.9

Predictor = Callable[[torch.Tensor], "torch.Tensor | None"]
# (1, *X) -> (1, N) expert ids, best first, and how many of them the router would choose.
WidePredictor = Callable[[torch.Tensor], "tuple[torch.Tensor, int] | None"]


class Prefetcher(Protocol):
    """Contract of the controller that fetches predicted experts (prefetch/controller.py)."""

    def is_on(self, distance: int = 1) -> bool:
        """True when a prediction for a layer so many layers ahead would be acted upon."""

    def request(
        self, layer_idx: int, expert_ids: Iterable[int], *, distance: int, whole_layer: bool = False,
        num_sure: int | None = None,
    ) -> None:  # fmt: skip
        """The layer will need these experts, the surest first; replaces what was wanted of it.

        `num_sure`: one token is decoded, and its router would choose the first so many.
        """

    def router_spoke(self, layer_idx: int, expert_ids: Iterable[int]) -> None:
        """The layer's own router has chosen."""

    def pump(self) -> None:
        """Start what may start."""


@dataclass(frozen=True, slots=True)
class RouterGuess:
    """A guess that was handed to the prefetcher. `distance` 0: from the layer's own input, before its attention."""

    layer_idx: int
    expert_ids: tuple[int, ...]
    distance: int
    whole_layer: bool


@dataclass(frozen=True, slots=True)
class _Pending:
    ids_TK: torch.Tensor
    distance: int
    num_chosen: int  # of the ids of a token, those that its router would choose


class Lookahead:
    """Turns observed states into wants. Called by the one thread that runs the model.

    Host and device: on the CPU routers are asked when the executor says `look`, when the layer's own fetches are under
    way, and the answer is handed on at once. On another device they are asked as soon as the state is there, and
    reading the answer would make the host wait for the device, once more in each layer; there it is kept as a tensor,
    and the executor fetches it in the same copy as the ids that its own router chose:

        ids = torch.cat([own_ids.flatten(), *(t.flatten() for t in lookahead.pending().values())]).tolist()
        lookahead.router_spoke(layer_idx, ...)      # own ids, made distinct
        lookahead.take(next_layer_idx, ids_TK)      # for each pending layer, its share of the list, T rows of K

    `is_asleep`: nobody would act on a prediction; states need not be shown, and are not looked at.

    States are read by routers and let go: on another device before `observe_state` returns, since in a compiled step
    their memory is a graph's; on the CPU by the end of the executor's call. What is kept, ids, is the router's own.
    """

    def __init__(
        self, predictors: Sequence[Predictor | None], prefetcher: Prefetcher, *, order: Sequence[int],
        num_experts: Sequence[int], distance: int = 1, wide: Sequence[WidePredictor | None] | None = None,
        predictions: Callable[[RouterGuess], None] | None = None,
    ) -> None:  # fmt: skip
        """`predictors` and `num_experts`: one a layer, by its number. `order`: the numbers as the layers run.

        `distance`: how many layers ahead routers are asked, 1 to 3. `wide`: of one token these are asked, not the
        `predictors`. `predictions` is told of every answer.
        """
        assert 1 <= distance <= 3, f"{distance=}"
        self._predictors, self._prefetcher, self._num_experts = predictors, prefetcher, num_experts
        self._predictions, self._wide = predictions, wide
        self._coming = {
            layer_idx: list(enumerate(order[place + 1 : place + 1 + distance], start=1))
            for place, layer_idx in enumerate(order)
        }
        self.is_asleep = False
        self._pending: dict[int, _Pending] = {}
        self._seen: tuple[int, torch.Tensor] | None = None
        # Tokens of the state seen last, and the share of experts that this many tokens touched in the layer before.
        self._num_tokens = 0
        self._touched: tuple[int, float] = (0, 0.0)

    def __repr__(self) -> str:
        known = sum(predictor is not None for predictor in self._predictors)
        return f"<Lookahead [{known} of {len(self._predictors)} layers predicted, {len(self._pending)} pending]>"

    def observe_state(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        """The state after the layer's attention, from which it will choose its experts.

        Nothing is started here: this layer's own experts are not held yet. The executor pumps when they are.
        """
        if self.is_asleep:
            return
        self._num_tokens = state_TX.shape[0]
        if state_TX.device.type == "cpu":
            self._seen = (layer_idx, state_TX)
        else:
            self._ask(layer_idx, state_TX)

    def look(self, layer_idx: int) -> None:
        """The layer's own fetches are under way: ask the routers of the layers after it, if that was not done."""
        seen, self._seen = self._seen, None
        if seen is not None and seen[0] == layer_idx:
            self._ask(*seen)

    def observe_input(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        """The layer's input: ask its own router again, which knows better now. What this adds is started at once.

        Not on a device, where the answer would come with the layer's own ids; nor where all of it is wanted already.
        In virtual time 4 layers with slots for 3 of 16 experts take 4 to 8% longer without.
        """
        self._num_tokens = state_TX.shape[0]
        if state_TX.device.type == "cpu" and not self._touches_all() and self._prefetcher.is_on(0):
            self._predict(layer_idx, state_TX, 0)
            self._prefetcher.pump()

    def _ask(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        for distance, target_idx in self._coming[layer_idx]:
            if self._touches_all():
                self._want(target_idx, range(self._num_experts[target_idx]), distance, whole_layer=True)
            elif self._prefetcher.is_on(distance):
                self._predict(target_idx, state_TX, distance)

    def pending(self) -> dict[int, torch.Tensor]:
        """Predictions that are still on the device: layer -> ids (T, K). Hand them over with `take`."""
        return {layer_idx: waiting.ids_TK for layer_idx, waiting in self._pending.items()}

    def take(self, layer_idx: int, ids_TK: Sequence[Sequence[int]]) -> None:
        """The pending prediction of a layer, as numbers on the host: T rows of K."""
        waiting = self._pending.pop(layer_idx)
        ranked = rank_experts(ids_TK, self._num_experts[layer_idx])
        num_sure = waiting.num_chosen if len(ids_TK) == 1 else None
        self._want(layer_idx, ranked, waiting.distance, whole_layer=False, num_sure=num_sure)

    def router_spoke(self, layer_idx: int, expert_ids: Iterable[int]) -> None:
        """The layer's router chose these distinct experts: passed on to the prefetcher, which drops the layer's wants.

        Called between the layer's `observe_state` and its `look`.
        """
        chosen = set(expert_ids)
        self._pending.pop(layer_idx, None)
        self._touched = (self._num_tokens, len(chosen) / self._num_experts[layer_idx])
        self._prefetcher.router_spoke(layer_idx, chosen)

    def sleep(self) -> None:
        """Until `reset`: what was seen and guessed is forgotten."""
        self.reset()
        self._num_tokens, self._touched = 0, (0, 0.0)
        self.is_asleep = True

    def reset(self) -> None:
        """A call was broken off: forget what was seen and guessed in it. Awake."""
        self._pending.clear()
        self._seen = None
        self.is_asleep = False

    def _touches_all(self) -> bool:
        num_tokens, share = self._touched
        return num_tokens > 1 and num_tokens == self._num_tokens and share >= WHOLE_LAYER_SHARE

    def _predict(self, layer_idx: int, state_TX: torch.Tensor, distance: int) -> None:
        answer = self._answer(layer_idx, state_TX)
        if answer is not None:
            ids_TK, num_chosen = answer
            self._pending[layer_idx] = _Pending(ids_TK, distance, num_chosen)
            if ids_TK.device.type == "cpu":
                self.take(layer_idx, ids_TK.tolist())

    def _answer(self, layer_idx: int, state_TX: torch.Tensor) -> tuple[torch.Tensor, int] | None:
        """Ids, and how many of a token's are the router's choice; None where there is no answer."""
        if self._wide is not None and state_TX.shape[0] == 1:
            wide = self._wide[layer_idx]
            return None if wide is None else wide(state_TX)
        predictor = self._predictors[layer_idx]
        ids_TK = None if predictor is None else predictor(state_TX)
        return None if ids_TK is None else (ids_TK, ids_TK.shape[1])

    def _want(
        self, layer_idx: int, expert_ids: Sequence[int], distance: int, *, whole_layer: bool,
        num_sure: int | None = None,
    ) -> None:  # fmt: skip
        self._prefetcher.request(layer_idx, expert_ids, distance=distance, whole_layer=whole_layer, num_sure=num_sure)
        if self._predictions is not None:
            self._predictions(RouterGuess(layer_idx, tuple(expert_ids), distance, whole_layer))


def rank_experts(ids_TK: Sequence[Sequence[int]], num_experts: int) -> list[int]:
    """Distinct experts, the surest first: named by most tokens, then as an earlier choice, then by number.

    For one token that is its router's own order. Ids outside the layer's experts are padding.
    """
    counts: Counter[int] = Counter()
    earliest: dict[int, int] = {}
    for ids_K in ids_TK:
        for choice, expert_idx in enumerate(ids_K):
            if 0 <= expert_idx < num_experts:
                counts[expert_idx] += 1
                earliest[expert_idx] = min(choice, earliest.get(expert_idx, choice))
    return sorted(counts, key=lambda idx: (-counts[idx], earliest[idx], idx))
