"""The ledger of fetches ahead of time: each is begun once and ends once, used or wasted. Keys and integers only."""

from __future__ import annotations

from collections.abc import Callable

from offmoe.core.counters import Counters
from offmoe.core.keys import ExpertKey


class PrefetchTracker:
    """Prefetches into one cache and has not ended: `unused`, of which some is still under way.

    `guesses` are those of `unused` that were fetched for the next call of their layer: until then they are not evicted
    for others, and then they were right or wrong. What else was fetched ahead is there to stay, like any other expert.

    `counters.ahead_bytes == ahead_used_bytes + ahead_wasted_bytes + the bytes of unused`, always.
    """

    def __init__(self, counters: Counters, num_bytes: Callable[[ExpertKey], int]) -> None:
        self.unused: set[ExpertKey] = set()
        self.guesses: set[ExpertKey] = set()
        self.under_way_bytes = 0
        self._counters, self._num_bytes = counters, num_bytes

    def began(self, key: ExpertKey, *, is_guess: bool) -> None:
        """A fetch ahead of time is under way."""
        self.unused.add(key)
        if is_guess:
            self.guesses.add(key)
        self.under_way_bytes += self._num_bytes(key)
        self._counters.ahead_bytes += self._num_bytes(key)

    def landed(self, key: ExpertKey) -> None:
        """A fetch, of whatever kind, is no longer under way."""
        if key in self.unused:
            self.under_way_bytes -= self._num_bytes(key)

    def used(self, key: ExpertKey) -> None:
        """`key` is used; news only where it was fetched ahead and not used before."""
        if key in self.unused:
            self._forget(key)
            self._counters.ahead_used_bytes += self._num_bytes(key)

    def wasted(self, key: ExpertKey, *, is_under_way: bool = False) -> None:
        """`key` goes, or comes for nothing; news only where it was fetched ahead and not used before."""
        if key in self.unused:
            if is_under_way:
                self.under_way_bytes -= self._num_bytes(key)
            self._forget(key)
            self._counters.ahead_wasted_bytes += self._num_bytes(key)

    def _forget(self, key: ExpertKey) -> None:
        self.unused.discard(key)
        self.guesses.discard(key)

    def recover(self) -> None:
        """Nothing is under way any more: all that was not used is wasted."""
        self._counters.ahead_wasted_bytes += sum(self._num_bytes(key) for key in self.unused)
        self.unused.clear()
        self.guesses.clear()
        self.under_way_bytes = 0
