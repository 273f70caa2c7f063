"""S3-FIFO (Yang et al., SOSP 2023): a small queue on trial, a main queue, and the names of those that failed."""

from __future__ import annotations

from collections import OrderedDict

from offmoe.base.keys import ExpertKey
from offmoe.cache.ranking import IsEvictable, RankingPolicy
from offmoe.cache.usage import Usage

# The trial queue's share of the keys; uses that count at most; uses that pass the trial.
SMALL_SHARE, MOST_USES, PASSING_USES = 0.1, 3, 2


class S3FifoPolicy(RankingPolicy):
    """New keys go through a small queue and leave early unless they are used again; the others get second chances.

    A key that comes back while its name is remembered goes to the main queue at once. As many names are remembered as
    there are keys in that queue.
    """

    name = "s3fifo"

    def __init__(self, usage: Usage | None = None) -> None:
        super().__init__(usage)
        self._small: OrderedDict[ExpertKey, int] = OrderedDict()
        self._main: OrderedDict[ExpertKey, int] = OrderedDict()
        self._names: OrderedDict[ExpertKey, None] = OrderedDict()

    def _ranked(self) -> list[ExpertKey]:
        return [*self._small, *self._main]

    def _clear(self) -> None:
        self._small.clear()
        self._main.clear()

    def _add(self, key: ExpertKey) -> None:
        if key in self._names:
            del self._names[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def _use(self, key: ExpertKey) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(MOST_USES, queue[key] + 1)

    def _drop(self, key: ExpertKey) -> None:
        if self._small.pop(key, None) is None:
            del self._main[key]
            return
        self._names[key] = None
        while len(self._names) > max(1, len(self._main)):
            self._names.popitem(last=False)

    def _lowest(self, is_evictable: IsEvictable) -> ExpertKey | None:
        """Moves keys between the queues and back in them as it goes, each once for each use."""
        if len(self._small) >= SMALL_SHARE * (len(self._small) + len(self._main)):
            return self._from_small(is_evictable) or self._from_main(is_evictable)
        return self._from_main(is_evictable) or self._from_small(is_evictable)

    def _from_small(self, is_evictable: IsEvictable) -> ExpertKey | None:
        passed, found = [], None
        for key, uses in self._small.items():
            if uses >= PASSING_USES:
                passed.append(key)
            elif is_evictable(key):
                found = key
                break
        for key in passed:
            del self._small[key]
            self._main[key] = 0
        return found

    def _from_main(self, is_evictable: IsEvictable) -> ExpertKey | None:
        """The oldest that may go and has no use to its credit; one that has pays with it for another round."""
        while (key := next((key for key in self._main if is_evictable(key)), None)) is not None:
            uses = self._main[key]
            if not uses:
                return key
            self._main[key] = uses - 1
            self._main.move_to_end(key)
        return None
