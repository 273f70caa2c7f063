"""A fair share of the slots for each layer: where one token needs more experts than there are slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offmoe.cache.ranking import IsEvictable, Policy
from offmoe.cache.usage import Usage
from offmoe.core.keys import ExpertKey


def fair_shares(num_slots: int, num_layers: int) -> list[int]:
    """Slots of each layer: equal, and one more for the first few where that leaves some."""
    share, more = divmod(num_slots, num_layers)
    return [share + (layer_idx < more) for layer_idx in range(num_layers)]


class PerLayerPolicy:
    """Each layer has a policy of its own, and takes from itself what it needs beyond its share.

    Slots that a layer does not use yet may be used by others, who give them back first.
    """

    def __init__(
        self, make: Callable[[Usage], Policy], shares: Sequence[int], usage: Usage | None = None
    ) -> None:  # fmt: skip
        self.usage = usage if usage is not None else Usage()
        self._shares = shares
        self._policies = [make(self.usage) for _ in shares]
        self._num_keys = [0] * len(shares)

    @property
    def name(self) -> str:
        """The policy's name: the layers' own, with shares."""
        return self._policies[0].name

    def __repr__(self) -> str:
        kind = type(self._policies[0]).__name__
        return f"<{kind} for each of {len(self._shares)} layers [{sum(self._num_keys)} keys]>"

    def inserted(self, key: ExpertKey, *, cold: bool) -> None:
        """Into its layer."""
        self._num_keys[key.layer_idx] += 1
        self._policies[key.layer_idx].inserted(key, cold=cold)

    def touched(self, key: ExpertKey) -> None:
        """In its layer."""
        self._policies[key.layer_idx].touched(key)

    def removed(self, key: ExpertKey) -> None:
        """From its layer."""
        self._num_keys[key.layer_idx] -= 1
        self._policies[key.layer_idx].removed(key)

    def token_pass(self) -> None:
        """Time passes for all of them."""
        self.usage.token_pass()

    def victim(self, is_evictable: IsEvictable, layer_idx: int | None = None) -> ExpertKey | None:
        """A victim of the layer itself where it has its share, else of the one that is furthest above its own."""
        over = [num_keys - share for num_keys, share in zip(self._num_keys, self._shares, strict=True)]
        order = sorted(range(len(over)), key=over.__getitem__, reverse=True)
        if layer_idx is not None and over[layer_idx] >= 0:
            order.insert(0, layer_idx)
        for other in order:
            if self._num_keys[other] and (key := self._policies[other].victim(is_evictable)) is not None:
                return key
        return None

    def drain(self) -> tuple[list[ExpertKey], list[ExpertKey]]:
        """All keys, cold and others, layer by layer."""
        drained = [policy.drain() for policy in self._policies]
        self._num_keys = [0] * len(self._shares)
        return [key for cold, _ in drained for key in cold], [key for _, ranked in drained for key in ranked]

    def restored(self, key: ExpertKey, *, cold: bool) -> None:
        """Into its layer."""
        self._num_keys[key.layer_idx] += 1
        self._policies[key.layer_idx].restored(key, cold=cold)
