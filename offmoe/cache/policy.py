"""Eviction policies: whom to forget. Keys only; no bytes, no torch.

A policy is told of every use and answers one question, `victim`. Adding one: a class with these five methods, an entry
in `_POLICIES`, and the contract tests run on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from offmoe.base.errors import UsageError
from offmoe.base.keys import ExpertKey


class Policy(Protocol):
    """The contract. Every key is inserted once, then touched any number of times, then removed."""

    def inserted(self, key: ExpertKey, *, cold: bool) -> None:
        """`key` was given a slot. `cold`: it serves one use and should be the next to go."""

    def touched(self, key: ExpertKey) -> None:
        """`key` was found in its slot and used."""

    def removed(self, key: ExpertKey) -> None:
        """`key` lost its slot."""

    def victim(self, is_evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The key to forget, or None when `is_evictable` refuses all."""


class LruPolicy:
    """Least recently used, over all layers together. Cold keys go before every other, the newest cold key first."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<LruPolicy [{len(self._order)} keys]>"

    def inserted(self, key: ExpertKey, *, cold: bool) -> None:
        """Newest, or with `cold` the oldest."""
        self._order[key] = None
        self._order.move_to_end(key, last=not cold)

    def touched(self, key: ExpertKey) -> None:
        """Newest."""
        self._order.move_to_end(key)

    def removed(self, key: ExpertKey) -> None:
        """Forget its place."""
        del self._order[key]

    def victim(self, is_evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The oldest that may go; O(held) beyond the first."""
        return next((key for key in self._order if is_evictable(key)), None)


_POLICIES: dict[str, Callable[[], Policy]] = {"lru": LruPolicy}
POLICY_NAMES = ("auto", *_POLICIES)


def make_policy(name: str) -> Policy:
    """The policy called `name`; "auto" is LRU. An unknown name lists the known ones (UsageError)."""
    factory = _POLICIES.get("lru" if name == "auto" else name)
    if factory is None:
        raise UsageError(f"policy is {name!r}; known: {', '.join(POLICY_NAMES)}")
    return factory()
