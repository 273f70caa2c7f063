"""The misses of a layer call, as the scheduler sees them, and what follows from its word.

A miss that the CPU serves is copied to the device as well where the cache admits it (ExpertCache.admit): in the
background, and to stay like any other expert.
"""

from __future__ import annotations

from collections.abc import Sequence

from offmoe.cache.expert_cache import ExpertCache
from offmoe.core.keys import ExpertKey
from offmoe.placement.choose import Miss, Placement, Where
from offmoe.placement.scheduler import MissScheduler

# A product of one row with an expert's weights takes two operations for each weight.
FLOPS_PER_WEIGHT = 2.0


class MissPlacer:
    """Asks `scheduler` where the misses of `cache` are to be computed, knowing what `host`, the RAM below it, has."""

    def __init__(
        self, scheduler: MissScheduler, cache: ExpertCache, host: ExpertCache, *, bytes_per_weight: float
    ) -> None:
        self.scheduler = scheduler
        self._cache, self._host, self._bytes_per_weight = cache, host, bytes_per_weight

    def place(
        self, layer_idx: int, late: Sequence[ExpertKey], missing: Sequence[ExpertKey], rows: dict[ExpertKey, int]
    ) -> set[ExpertKey]:
        """The experts to compute in RAM: of `missing`, and of `late` those whose copies would take far too long.

        Called in every layer call, also when nothing is missed: the scheduler learns from the time between calls.
        """
        misses = [self._miss(key, rows[key], is_late=True) for key in late]
        misses += [self._miss(key, rows[key], is_late=False) for key in missing]
        placements = self.scheduler.place(layer_idx, misses)
        return {key for key, place in zip((*late, *missing), placements, strict=True) if place is Placement.CPU}

    def _miss(self, key: ExpertKey, num_rows: int, *, is_late: bool) -> Miss:
        num_bytes = self._cache.num_bytes(key)
        where = Where.HOST
        if not self._host.is_ready(key):
            where = Where.COMING if self._host.is_coming(key) else Where.DISK
        return Miss(
            num_bytes=num_bytes, num_rows=num_rows, where=where, copy_left_bytes=num_bytes if is_late else None,
            flops_per_row=FLOPS_PER_WEIGHT * num_bytes / self._bytes_per_weight,
        )  # fmt: skip

    def served(self, keys: Sequence[ExpertKey]) -> None:
        """The CPU has computed these: copy to the device what its cache admits."""
        for key in keys:
            self._cache.admit(key)
