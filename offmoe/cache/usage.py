"""Counts and times of experts' uses. Keys and numbers only."""

from __future__ import annotations

from collections.abc import Mapping

from offmoe.core.keys import ExpertKey

# Counts are halved after so many token passes, so that what mattered for another topic fades.
HALVE_AFTER = 200


class Usage:
    """Counts of all experts ever used, also of those that are in no slot. `now` counts token passes.

    `halvings` changes whenever the counts did without `note`: who has put them in order begins anew then.
    """

    __slots__ = ("counts", "halvings", "last", "now")

    def __init__(self, counts: Mapping[ExpertKey, int] | None = None) -> None:
        """`counts`: of earlier runs."""
        self.counts: dict[ExpertKey, int] = dict(counts or {})
        self.last: dict[ExpertKey, int] = {}
        self.now = self.halvings = 0

    def __repr__(self) -> str:
        return f"<Usage [{len(self.counts)} experts, {self.now} passes]>"

    def note(self, key: ExpertKey) -> None:
        """`key` is used in this pass."""
        self.counts[key] = self.counts.get(key, 0) + 1
        self.last[key] = self.now

    def token_pass(self) -> None:
        """A pass of all layers begins."""
        self.now += 1
        if self.now % HALVE_AFTER == 0:
            self.halve()

    def halve(self) -> None:
        """Halve every count, rounded down; what comes to nothing is forgotten."""
        self.counts = {key: count >> 1 for key, count in self.counts.items() if count > 1}
        self.last = {key: now for key, now in self.last.items() if key in self.counts}
        self.halvings += 1
