"""Confidence in guesses, learnt while running: by layer, by distance and by place in the router's ranking.

Only guesses count whose expert was not in memory and not on its way: these are the ones that a fetch is about, and
they come true less often than the others, since what is often used is cached already. Each guess is learnt from once
its layer has spoken, fetched or not, so nothing has to be fetched to find out. Keys and numbers only, no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

# Tries after which half of what was learnt is forgotten: topics change.
HALVE_AFTER = 256.0
# The layers' common experience counts as so many tries of a layer's own, and this prior as so many common ones.
COMMON_TRIES, PRIOR_TRIES = 8.0, 4.0
PRIOR_CHANCE = 0.5


class _Tally:
    """Tries and successes, recent ones weighing more."""

    __slots__ = ("successes", "tries")

    def __init__(self) -> None:
        self.tries = self.successes = 0.0

    def add(self, success: bool) -> None:
        self.tries += 1
        self.successes += success
        if self.tries > HALVE_AFTER:
            self.tries /= 2
            self.successes /= 2

    def chance(self, prior: float, weight: float) -> float:
        return (self.successes + weight * prior) / (self.tries + weight)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A guess that could be fetched. `rank` 0 is the router's first choice."""

    expert_idx: int
    rank: int
    chance: float


class PrefetchConfidence:
    """Chance that a guess comes true: a layer's own experience, and before there is any, that of all layers."""

    def __init__(self) -> None:
        self._own: dict[tuple[int, int, int], _Tally] = {}
        self._common: dict[tuple[int, int], _Tally] = {}
        self._open: dict[int, dict[int, Sequence[Candidate]]] = {}

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{distance}: {self.common(distance, 0):.0%}"
            for distance in sorted({distance for distance, _ in self._common})
        )
        return f"<PrefetchConfidence [of first choices, by distance: {shown or 'nothing learnt'}]>"

    def common(self, distance: int, rank: int) -> float:
        """Confidence of all layers together."""
        tally = self._common.get((distance, rank))
        return PRIOR_CHANCE if tally is None else tally.chance(PRIOR_CHANCE, PRIOR_TRIES)

    def chance(self, layer_idx: int, distance: int, rank: int) -> float:
        """Confidence of one layer, 0 to 1."""
        tally, common = self._own.get((layer_idx, distance, rank)), self.common(distance, rank)
        return common if tally is None else tally.chance(common, COMMON_TRIES)

    def guessed(self, layer_idx: int, distance: int, missing: Sequence[tuple[int, int]]) -> list[Candidate]:
        """`missing`: rank and expert of guesses that are not in memory and not on their way. The same, with chances;
        they are remembered until `spoke`.
        """
        found = [Candidate(expert, rank, self.chance(layer_idx, distance, rank)) for rank, expert in missing]
        self._open.setdefault(layer_idx, {})[distance] = found
        return found

    def spoke(self, layer_idx: int, needed: Collection[int]) -> None:
        """The layer's router chose `needed`: learn from what had been guessed."""
        for distance, candidates in self._open.pop(layer_idx, {}).items():
            for candidate in candidates:
                success = candidate.expert_idx in needed
                self._own.setdefault((layer_idx, distance, candidate.rank), _Tally()).add(success)
                self._common.setdefault((distance, candidate.rank), _Tally()).add(success)

    def forget_open(self) -> None:
        """A call was broken off: what was guessed in it is not learnt from."""
        self._open.clear()

    def as_dict(self) -> dict[str, list[float]]:
        """By distance, the chances of all layers together, the first choice first; for `stats()`."""
        ranks: dict[int, int] = {}
        for distance, rank in self._common:
            ranks[distance] = max(rank + 1, ranks.get(distance, 0))
        return {
            str(distance): [round(self.common(distance, rank), 3) for rank in range(num)]
            for distance, num in sorted(ranks.items())
        }


def is_worth(chance: float, price: float) -> bool:
    """A fetch that comes true with `chance` saves more than it costs, when a wasted byte costs `price` times what one
    fetched in time saves.
    """
    return chance > price * (1 - chance)
