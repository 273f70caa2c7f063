"""The policies by name, and how slots pass from one to another."""

from __future__ import annotations

from collections.abc import Callable, Collection

from offmoe.cache.frequency import DecayedPolicy, LfruPolicy
from offmoe.cache.per_layer import PerLayerPolicy, fair_shares
from offmoe.cache.ranking import IsEvictable, LruPolicy, Policy
from offmoe.cache.usage import Usage
from offmoe.core.errors import UsageError
from offmoe.core.keys import ExpertKey

__all__ = ["POLICY_NAMES", "KeepAllPolicy", "LruPolicy", "Policy", "hand_over", "make_policy", "needs_quota"]

_POLICIES: dict[str, Callable[[Usage | None], Policy]] = {
    "lru": LruPolicy, "lfru": LfruPolicy, "decayed": DecayedPolicy,
}  # fmt: skip
POLICY_NAMES = tuple(_POLICIES)


class KeepAllPolicy:
    """For a cache with room for everything: nothing goes but where experts turn out larger, and then the oldest."""

    name = "all"

    def __init__(self) -> None:
        self.usage = Usage()
        self._keys: dict[ExpertKey, None] = {}

    def __repr__(self) -> str:
        return "<KeepAllPolicy>"

    def inserted(self, key: ExpertKey, *, cold: bool) -> None:
        """There is room."""
        self._keys[key] = None

    def touched(self, key: ExpertKey) -> None:
        """Nothing to compare it with."""

    def removed(self, key: ExpertKey) -> None:
        """A fetch failed, or two slots were needed."""
        self._keys.pop(key, None)

    def token_pass(self) -> None:
        """Nothing ages."""

    def victim(self, is_evictable: IsEvictable, layer_idx: int | None = None) -> ExpertKey | None:
        """The first that came of those that may go."""
        return next((key for key in self._keys if is_evictable(key)), None)

    def drain(self) -> tuple[list[ExpertKey], list[ExpertKey]]:
        """All keys, in the order in which they came."""
        keys, self._keys = list(self._keys), {}
        return [], keys

    def restored(self, key: ExpertKey, *, cold: bool) -> None:
        """There is room."""
        self._keys[key] = None


def make_policy(
    name: str, usage: Usage | None = None, *, num_slots: int = 0, num_layers: int = 0, quota: bool = False
) -> Policy:
    """The policy called `name`; with `quota` one for each layer's fair share of `num_slots`.

    `usage`: what is known of earlier uses; it is kept up to date. An unknown name lists the known ones (UsageError).
    """
    make = _POLICIES.get(name)
    if make is None:
        raise UsageError(f"policy is {name!r}; known: {', '.join(POLICY_NAMES)}")
    return PerLayerPolicy(make, fair_shares(num_slots, num_layers), usage) if quota else make(usage)


def needs_quota(num_slots: int, num_layers: int, top_k: int) -> bool:
    """Whether a share for each layer is better than one pool: one token needs more experts than there are slots."""
    return num_slots < num_layers * top_k


def hand_over(old: Policy, new: Policy, kept: Collection[ExpertKey] | None = None) -> None:
    """`new`, made with the usage of `old`, takes over its keys. They may be the same policy.

    `kept`: the keys that there are in truth, after a call was broken off; others are dropped, unknown ones taken up.
    """
    cold, ranked = old.drain()
    if kept is not None:
        unknown = set(kept).difference(cold, ranked)
        cold, ranked = ([key for key in keys if key in kept] for keys in (cold, ranked))
        ranked += sorted(unknown)
    ranked.sort(key=lambda key: old.usage.last.get(key, 0))
    for key in cold:
        new.restored(key, cold=True)
    for key in ranked:
        new.restored(key, cold=False)
