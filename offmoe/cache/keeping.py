"""Which experts of a layer call stay afterwards, and how many are fetched at once. Shared by executor and replay."""

from __future__ import annotations

from collections.abc import Mapping

# Moves in flight at once: enough to keep a drive busy; more only lengthens the wait for the first.
MAX_READS_IN_FLIGHT = 8


def experts_to_keep(rows_by_expert: Mapping[int, int], slots_per_layer: int) -> set[int]:
    """A call that touches more than the layer's share of slots (prefill) keeps only the busiest experts.

    The others serve this call and go first, so that one long prompt neither fills the cache with one layer nor drives
    out what decoding uses.
    """
    share = max(1, slots_per_layer)
    if len(rows_by_expert) <= share or max(rows_by_expert.values()) == 1:  # one token: all are equally recent
        return set(rows_by_expert)
    return set(sorted(rows_by_expert, key=lambda idx: (-rows_by_expert[idx], idx))[:share])
