"""Requests: what coming layers are expected to need, and what a prefetcher asks of the cache that it fetches into."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Protocol

from offmoe.cache.slots import SlotTable
from offmoe.core.counters import Counters
from offmoe.core.keys import ExpertKey


class PrefetchTarget(Protocol):
    """Methods of `ExpertCache` that a prefetcher uses."""

    slots: SlotTable
    counters: Counters

    @property
    def guesses(self) -> Collection[ExpertKey]:
        """Fetched for the next call of their layer, which has not run yet; some are still under way."""

    @property
    def ahead_bytes(self) -> int:
        """Bytes of prefetches under way."""

    @property
    def slots_per_layer(self) -> int:
        """A layer's fair share of the slots."""

    def num_bytes(self, key: ExpertKey) -> int:
        """Bytes that fetching `key` moves."""

    def is_ready(self, key: ExpertKey) -> bool:
        """True when `key` can be used at once."""

    def is_coming(self, key: ExpertKey) -> bool:
        """True when `key` is on its way."""

    def start_ahead(self, key: ExpertKey, *, keep: Collection[ExpertKey]) -> bool:
        """Begin fetching `key` into a free slot or that of a key not in `keep`; False when there is none."""

    def cancel_ahead(self, key: ExpertKey) -> bool:
        """Take a fetch back that nobody waits for; True when it will not arrive."""

    def expire_ahead(self, layer_idx: int, needed: Collection[ExpertKey]) -> None:
        """Whatever else was fetched ahead for this layer was for nothing."""

    def poll(self) -> None:
        """Settle what has arrived: it becomes READY."""


class LayerRequest:
    """Expected needs of one layer: `experts`, all of it, and `queue`, what of it is to be fetched and was not
    begun yet. `due`: the layer call, counted from the first, that is expected to be its own.
    """

    __slots__ = ("due", "experts", "queue", "whole_layer")

    def __init__(self, experts: Iterable[int], queue: Iterable[int], *, due: int, whole_layer: bool) -> None:
        self.queue = deque(dict.fromkeys(queue))
        self.experts = frozenset(experts).union(self.queue)
        self.due, self.whole_layer = due, whole_layer


class RequestedKeys(Collection[ExpertKey]):
    """The wanted keys of all layers, as they are now."""

    def __init__(self, wanted: dict[int, LayerRequest]) -> None:
        self._wanted = wanted

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, ExpertKey):
            return False
        wanted = self._wanted.get(key.layer_idx)
        return wanted is not None and key.expert_idx in wanted.experts

    def __iter__(self) -> Iterator[ExpertKey]:
        return (ExpertKey(layer, expert) for layer, wanted in self._wanted.items() for expert in wanted.experts)

    def __len__(self) -> int:
        return sum(len(wanted.experts) for wanted in self._wanted.values())
