"""The misses of a layer call, as the arbiter sees them, and what follows from its word.

A miss that the CPU serves is not copied to the device as well, unless admission finds that it pays: then the copy goes
in the background, and stays like any other expert until it is the least useful one.
"""

from __future__ import annotations

from collections.abc import Sequence

from offmoe.base.keys import ExpertKey
from offmoe.cache.ahead_books import AheadListener
from offmoe.cache.expert_cache import ExpertCache
from offmoe.executor.arbiter import Arbiter
from offmoe.executor.decide import Miss, Placement, Where

# A product of one row with an expert's weights takes two operations for each weight.
FLOPS_PER_WEIGHT = 2.0


class MissPlacer:
    """Asks `arbiter` where the misses of `cache` are to be computed, knowing what `host`, the RAM below it, has."""

    def __init__(self, arbiter: Arbiter, cache: ExpertCache, host: ExpertCache, *, bytes_per_weight: float) -> None:
        self.arbiter = arbiter
        self._cache, self._host, self._bytes_per_weight = cache, host, bytes_per_weight

    def place(
        self, layer_idx: int, late: Sequence[ExpertKey], missing: Sequence[ExpertKey], rows: dict[ExpertKey, int]
    ) -> set[ExpertKey]:
        """The experts to compute in RAM: of `missing`, and of `late` those whose copies would take far too long.

        Called in every layer call, also when nothing is missed: the arbiter learns from the time between calls.
        """
        misses = [self._miss(key, rows[key], is_late=True) for key in late]
        misses += [self._miss(key, rows[key], is_late=False) for key in missing]
        placements = self.arbiter.place(layer_idx, misses)
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
        """The CPU has computed these: copy to the device what admission lets through."""
        admission = self.arbiter.admission
        if admission is None or not keys:
            return
        num_bytes = self._cache.num_bytes(keys[0])
        for key in admission.admit(keys, num_bytes):
            if not self._cache.start_ahead(key, keep=(), to_stay=True):
                admission.refused(key, num_bytes)


class AheadFates:
    """Tells both who may have begun a fetch ahead of time how it ended: the prefetcher and admission."""

    def __init__(self, *listeners: AheadListener) -> None:
        self._listeners = listeners

    def used_ahead(self, key: ExpertKey, *, late: bool, waited_ns: int) -> None:
        """It was used."""
        for listener in self._listeners:
            listener.used_ahead(key, late=late, waited_ns=waited_ns)

    def wasted_ahead(self, key: ExpertKey) -> None:
        """It was not used."""
        for listener in self._listeners:
            listener.wasted_ahead(key)


class AdmissionFates:
    """An admitted copy's fate, for `Admission`."""

    def __init__(self, arbiter: Arbiter) -> None:
        self._arbiter = arbiter

    def used_ahead(self, key: ExpertKey, *, late: bool, waited_ns: int) -> None:
        """It was used."""
        if self._arbiter.admission is not None:
            self._arbiter.admission.used(key)

    def wasted_ahead(self, key: ExpertKey) -> None:
        """It was not used."""
        if self._arbiter.admission is not None:
            self._arbiter.admission.wasted(key)
