"""Lookahead and prefetcher together, as the executor sees them: what to tell whom in which order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from offmoe.online.ab_test import ABTest
from offmoe.prefetch.controller import PrefetchController
from offmoe.prefetch.lookahead import Lookahead
from offmoe.prefetch.two_tiers import TwoTierPrefetcher


class PrefetchCoordinator:
    """A forward pass runs the layers of `order`; each tells when its router spoke, when it waits and when it ended.

    While nothing is fetched ahead, and nothing is under way, the passes of single tokens go by unwatched: hooks
    and books cost 35 to 45 us a layer (measured), which is 2 to 4% of a layer of 1 to 2 ms. Prompts are watched always.
    """

    def __init__(
        self, lookahead: Lookahead, prefetcher: PrefetchController | TwoTierPrefetcher, *, order: Sequence[int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.lookahead, self.prefetcher = lookahead, prefetcher
        self._first, self._last = order[0], order[-1]
        self._clock = clock
        self._begin_s = clock()
        self._num_tokens = 0

    @property
    def is_asleep(self) -> bool:
        """Nothing is under way, and nothing will be guessed or fetched before the next prompt or comparison."""
        return self.lookahead.is_asleep

    @property
    def ab_tests(self) -> list[ABTest[int]]:
        """The comparisons that it makes."""
        return self.prefetcher.ab_tests

    def pending(self) -> dict[int, torch.Tensor]:
        """Predictions on the device that the host does not have yet; hand them over with `take`."""
        return self.lookahead.pending()

    def take(self, layer_idx: int, ids_TK: Sequence[Sequence[int]]) -> None:
        """A pending prediction, as numbers."""
        self.lookahead.take(layer_idx, ids_TK)

    def router_spoke(
        self, layer_idx: int, expert_ids: Sequence[int], num_tokens: int, *, now_s: float | None = None
    ) -> None:
        """Before anything of the layer is used or fetched. `now_s`: told late, of that time by its clock."""
        if layer_idx == self._first:
            self._begin_s, self._num_tokens = self._clock() if now_s is None else now_s, num_tokens
        if self.lookahead.is_asleep:
            if num_tokens == 1:
                return
            self.lookahead.reset()
        self.lookahead.router_spoke(layer_idx, expert_ids)

    def look(self, layer_idx: int, *, is_waiting: bool) -> None:
        """The layer's own fetches are under way, and it will wait for them, or there are none: a moment to guess."""
        if self.lookahead.is_asleep:
            return
        if is_waiting:
            self.prefetcher.demand_begins()
        self.lookahead.look(layer_idx)
        self.prefetcher.pump()

    def demand_ends(self, stall_ns: int) -> None:
        """They have arrived: the tier below is free for others."""
        self.prefetcher.demand_ends(stall_ns)

    def stall_measured(self, stall_ns: int) -> None:
        """A device's stream told late that it had stood still; see `PrefetchController.stall_measured`."""
        self.prefetcher.stall_measured(stall_ns)

    def pump(self) -> None:
        """A moment to start something; what the layer needs is held."""
        if not self.lookahead.is_asleep:
            self.prefetcher.pump()

    def layer_ended(self, layer_idx: int, *, now_s: float | None = None) -> None:
        """The layer's sum is made. `now_s`: as of `router_spoke`."""
        self.pump()
        if layer_idx == self._last and self._num_tokens:
            end_s = self._clock() if now_s is None else now_s
            self.prefetcher.pass_ended(end_s - self._begin_s, num_tokens=self._num_tokens)
            if self._num_tokens == 1 and self.prefetcher.is_idle:
                self.lookahead.sleep()
            else:
                self.lookahead.is_asleep = False

    def reset(self) -> None:
        """A call was broken off."""
        self._num_tokens = 0
        self.lookahead.reset()
        self.prefetcher.reset()

    def as_dict(self) -> dict[str, Any]:
        """For `stats()`."""
        return self.prefetcher.as_dict()
