"""Eviction policies: whom to forget. Keys only; no bytes, no torch.

A policy is told of every use and answers one question, `victim`. Adding one: a subclass of `RankingPolicy` with four
methods, an entry in `_POLICIES` (cache/policy.py), and the contract tests run on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from offmoe.cache.usage import Usage
from offmoe.core.keys import ExpertKey

IsEvictable = Callable[[ExpertKey], bool]


class Policy(Protocol):
    """The contract. Every key is inserted once, then touched any number of times, then removed.

    `usage`: what was used how often, told by `inserted` (not cold) and `touched`; kept for keys without a slot too.
    """

    @property
    def usage(self) -> Usage:
        """Counts of all uses."""

    @property
    def name(self) -> str:
        """The policy's name in the settings."""

    def inserted(self, key: ExpertKey, *, cold: bool) -> None:
        """`key` was given a slot. `cold`: it serves one use and should be the next to go."""

    def touched(self, key: ExpertKey) -> None:
        """`key` was found in its slot and used."""

    def removed(self, key: ExpertKey) -> None:
        """`key` lost its slot."""

    def token_pass(self) -> None:
        """A token's pass through all layers begins, or a prompt chunk's: ages are counted in these."""

    def victim(self, is_evictable: IsEvictable, layer_idx: int | None = None) -> ExpertKey | None:
        """The key to forget, or None when `is_evictable` refuses all. `layer_idx`: of what the slot is for."""

    def drain(self) -> tuple[list[ExpertKey], list[ExpertKey]]:
        """Forget all keys (not `usage`): the cold and the others, each in the order of insertion or better of use.

        Works also after a call was broken off between any two lines; what was on its way in or out may be lost.
        """

    def restored(self, key: ExpertKey, *, cold: bool) -> None:
        """`key` has a slot, as before a `drain` of this policy or another one: placed by `usage`, and no use of it."""


class RankingPolicy(ABC):
    """Cold keys go before every other, the newest first; then the lowest by the rank that a subclass defines."""

    name = ""

    def __init__(self, usage: Usage | None = None) -> None:
        self.usage = usage if usage is not None else Usage()
        self._cold: dict[ExpertKey, None] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} [{len(self._cold) + len(self._ranked())} keys]>"

    def inserted(self, key: ExpertKey, *, cold: bool) -> None:
        """Ranked, or with `cold` the next to go."""
        if cold:
            self._cold[key] = None
        else:
            self.usage.note(key)
            self._add(key)

    def touched(self, key: ExpertKey) -> None:
        """Used: a cold key is cold no more."""
        self.usage.note(key)
        if key in self._cold:
            del self._cold[key]
            self._add(key)
        else:
            self._use(key)

    def removed(self, key: ExpertKey) -> None:
        """Forget its place, not its usage."""
        if key in self._cold:
            del self._cold[key]
        else:
            self._drop(key)

    def token_pass(self) -> None:
        """Time passes."""
        self.usage.token_pass()

    def victim(self, is_evictable: IsEvictable, layer_idx: int | None = None) -> ExpertKey | None:
        """The newest cold key, else the lowest, of those that may go, in whatever layer."""
        for key in reversed(self._cold):
            if is_evictable(key):
                return key
        return self._lowest(is_evictable)

    def drain(self) -> tuple[list[ExpertKey], list[ExpertKey]]:
        """All keys, cold and others."""
        cold, ranked = list(self._cold), self._ranked()
        self._cold.clear()
        self._clear()
        return cold, ranked

    def restored(self, key: ExpertKey, *, cold: bool) -> None:
        """In the order in which `drain` gave them."""
        if cold:
            self._cold[key] = None
        else:
            self._add(key)

    @abstractmethod
    def _ranked(self) -> list[ExpertKey]:
        """Keys that are not cold, from the oldest on where their order says so."""

    @abstractmethod
    def _clear(self) -> None:
        """Rank nothing."""

    @abstractmethod
    def _add(self, key: ExpertKey) -> None:
        """Rank `key`, which is used now and has none; `usage` knows already."""

    @abstractmethod
    def _use(self, key: ExpertKey) -> None:
        """`key`, ranked, is used now; `usage` knows already."""

    @abstractmethod
    def _drop(self, key: ExpertKey) -> None:
        """`key`, ranked, goes."""

    @abstractmethod
    def _lowest(self, is_evictable: IsEvictable) -> ExpertKey | None:
        """The ranked key that may go first; it stays until it is dropped."""


class LruPolicy(RankingPolicy):
    """Least recently used, over all layers together."""

    name = "lru"

    def __init__(self, usage: Usage | None = None) -> None:
        super().__init__(usage)
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def _ranked(self) -> list[ExpertKey]:
        return list(self._order)

    def _clear(self) -> None:
        self._order.clear()

    def _add(self, key: ExpertKey) -> None:
        self._order[key] = None

    def _use(self, key: ExpertKey) -> None:
        self._order.move_to_end(key)

    def _drop(self, key: ExpertKey) -> None:
        del self._order[key]

    def _lowest(self, is_evictable: IsEvictable) -> ExpertKey | None:
        """O(held) beyond the first."""
        return next((key for key in self._order if is_evictable(key)), None)
