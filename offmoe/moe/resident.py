"""A model whose experts are all on the device: kernels look the slots up there, and the host never waits for a router.

Shapes: T tokens, D model width, K experts a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from offmoe.cache.expert_cache import ExpertCache
from offmoe.cache.fetch import Fetch
from offmoe.core.keys import ExpertKey
from offmoe.kernels.reference import ExpertMath
from offmoe.kernels.slot_kernels import SlotKernels

# Copies under way while everything is brought to the device.
MAX_COPIES_IN_FLIGHT = 8


def preload(cache: ExpertCache, keys: list[ExpertKey], progress: Callable[[int, int], None]) -> None:
    """Bring all of `keys` into `cache`, which has room for them. `progress(done_bytes, total_bytes)`.

    Raises what a read or a copy fails with; nothing is held or under way afterwards in any case.
    """
    total, done = sum(cache.num_bytes(key) for key in keys), 0
    in_flight: deque[Fetch] = deque()

    def finish_one() -> None:
        nonlocal done
        fetch = in_flight.popleft()
        cache.finish(fetch)
        cache.release([fetch.key])
        done += cache.num_bytes(fetch.key)
        progress(done, total)

    try:
        for key in keys:
            while (fetch := cache.start(key, cold=False)) is None:
                assert in_flight, f"{cache!r} has no slot to free"
                finish_one()
            in_flight.append(fetch)
            if len(in_flight) >= MAX_COPIES_IN_FLIGHT:
                finish_one()
        while in_flight:
            finish_one()
    finally:
        cache.abandon(in_flight)


class ResidentExecutor:
    """Runs layers whose experts are all in `cache`'s slots, by a table that the kernels read on the device."""

    def __init__(self, cache: ExpertCache, kernels: SlotKernels) -> None:
        self._cache, self._kernels = cache, kernels

    def run_layer(
        self, layer_idx: int, math: ExpertMath, num_experts: int,
        x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The experts' weighted sum, (T, D). Every choice counts as a hit: the host does not see which they are."""
        self.count_hits(expert_ids_TK.numel())
        return self.look_up(layer_idx, x_TD, expert_ids_TK, weights_TK)

    def needs_no_host(self, layer_idx: int) -> bool:
        """Whether `look_up` of one token can be replayed as part of a CUDA graph."""
        return self._kernels.looks_up(layer_idx)

    def look_up(
        self, layer_idx: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Compute what `run_layer` does, without counting."""
        return self._kernels.lookup_forward(layer_idx, x_TD, expert_ids_TK, weights_TK)

    def count_hits(self, num_choices: int) -> None:
        """Count a layer's call."""
        self._cache.counters.layer_calls += 1
        self._cache.counters.hits += num_choices
