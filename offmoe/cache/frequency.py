"""Policies that count: LFRU and decayed frequency."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from heapq import heappop, heappush, heapreplace
from math import log2

from offmoe.cache.ranking import IsEvictable, RankingPolicy
from offmoe.cache.usage import Usage
from offmoe.core.keys import ExpertKey

# Token passes after which a use counts half in `DecayedPolicy`.
HALF_LIFE = 100


class LfruPolicy(RankingPolicy):
    """Lowest count / (age + 1) goes, age in whole token passes: often used and lately used both count.

    Keys of one count lie in a row, oldest first, so only the first of each row can be the lowest. Rows are tried from
    the smallest count on, and no further than where even the oldest key of all would not be lower. This is the hottest
    loop of all policies: of a row that cannot win no key is asked whether it may go.
    """

    name = "lfru"

    def __init__(self, usage: Usage | None = None) -> None:
        super().__init__(usage)
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()
        self._count_of: dict[ExpertKey, int] = {}
        self._rows: dict[int, OrderedDict[ExpertKey, None]] = {}
        self._halvings = self.usage.halvings

    def _ranked(self) -> list[ExpertKey]:
        return list(self._order)

    def _clear(self) -> None:
        self._order.clear()
        self._count_of.clear()
        self._rows.clear()

    def _add(self, key: ExpertKey) -> None:
        self._follow_halving()
        self._order[key] = None
        self._put(key)

    def _use(self, key: ExpertKey) -> None:
        self._follow_halving()
        self._order.move_to_end(key)
        self._take(key)
        self._put(key)

    def _drop(self, key: ExpertKey) -> None:
        del self._order[key]
        self._take(key)

    def _put(self, key: ExpertKey) -> None:
        count = self._count_of[key] = self.usage.counts.get(key, 0)
        row = self._rows.get(count)
        if row is None:
            row = self._rows[count] = OrderedDict()
        row[key] = None

    def _take(self, key: ExpertKey) -> None:
        count = self._count_of.pop(key)
        row = self._rows[count]
        del row[key]
        if not row:
            del self._rows[count]

    def _follow_halving(self) -> None:
        if self._halvings == self.usage.halvings:
            return
        self._halvings = self.usage.halvings
        self._rows.clear()
        for key in self._order:
            self._put(key)

    def _lowest(self, is_evictable: IsEvictable) -> ExpertKey | None:
        self._follow_halving()
        last, after = self.usage.last, self.usage.now + 1
        best, best_score = None, float("inf")
        most_passes = after - last.get(next(iter(self._order)), 0) if self._order else 1
        for count in sorted(self._rows):
            if count / most_passes > best_score:
                break
            for key in self._rows[count]:
                score = count / (after - last.get(key, 0))
                if score >= best_score:
                    break
                if is_evictable(key):
                    best, best_score = key, score
                    break
        return best


class _LazyHeapPolicy(RankingPolicy):
    """For ranks that only rise: a use changes a number, and the heap is put right when the lowest is asked for.

    The heap has one entry a key, of at most the key's rank; entries of keys that went stay until they come up.
    """

    def __init__(self, usage: Usage | None = None) -> None:
        super().__init__(usage)
        self._present: set[ExpertKey] = set()
        self._ranks: dict[ExpertKey, tuple[float, int]] = {}
        self._heap: list[tuple[tuple[float, int], ExpertKey]] = []
        self._in_heap: set[ExpertKey] = set()
        self._num_uses = 0

    @abstractmethod
    def _value(self, key: ExpertKey, old: float | None) -> float:
        """The value of `key` after its use, at least `old`, which it had before (None: it had none)."""

    def _ranked(self) -> list[ExpertKey]:
        return list(self._present)

    def _clear(self) -> None:
        self._present.clear()
        self._heap.clear()
        self._in_heap.clear()

    def _add(self, key: ExpertKey) -> None:
        self._present.add(key)
        self._use(key)
        if key not in self._in_heap:
            self._in_heap.add(key)
            heappush(self._heap, (self._ranks[key], key))

    def restored(self, key: ExpertKey, *, cold: bool) -> None:
        """With the rank it had, if it had one."""
        if cold or key not in self._ranks:
            super().restored(key, cold=cold)
        else:
            self._present.add(key)
            if key not in self._in_heap:
                self._in_heap.add(key)
                heappush(self._heap, (self._ranks[key], key))

    def _use(self, key: ExpertKey) -> None:
        old = self._ranks.get(key)
        self._num_uses += 1
        self._ranks[key] = (self._value(key, None if old is None else old[0]), self._num_uses)

    def _drop(self, key: ExpertKey) -> None:
        self._present.discard(key)

    def _lowest(self, is_evictable: IsEvictable) -> ExpertKey | None:
        heap, refused, lowest = self._heap, [], None
        while heap:
            rank, key = heap[0]
            if key not in self._present:
                heappop(heap)
                self._in_heap.discard(key)
            elif rank != self._ranks[key]:
                heapreplace(heap, (self._ranks[key], key))
            elif is_evictable(key):
                lowest = key
                break
            else:
                refused.append(heappop(heap))
        for entry in refused:
            heappush(heap, entry)
        return lowest


class DecayedPolicy(_LazyHeapPolicy):
    """Lowest decayed count goes: each use counts half after `HALF_LIFE` passes.

    All counts fade alike, so their order does not change with time: the rank is the logarithm of the count as it would
    have been at the beginning of time.
    """

    name = "decayed"

    def _value(self, key: ExpertKey, old: float | None) -> float:
        now = self.usage.last.get(key, 0) / HALF_LIFE
        if old is None:
            return now + log2(max(1, self.usage.counts.get(key, 0)))
        return now + log2(1 + 2.0 ** (old - now))
