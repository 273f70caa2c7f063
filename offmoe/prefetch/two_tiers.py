"""Fetches ahead of time beside a device: over the link for the next layer, and from disk into RAM further ahead.

The drive is slow and often idle while the link works, or while misses are computed in RAM and the link carries nothing.
So RAM has a queue, a budget and a comparison of its own, and is asked for the next three layers. Both queues are fed by
the same guesses. Keys and integers only; the one thread that runs the model calls everything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from offmoe.cache.expert_cache import ExpertCache
from offmoe.cache.slots import SlotTable
from offmoe.core.counters import Counters
from offmoe.core.keys import ExpertKey
from offmoe.online.ab_test import ABTest
from offmoe.prefetch.controller import PrefetchController


class BelowDevice:
    """The RAM cache, as its prefetcher sees it: what the device has, or will have, need not come to RAM."""

    def __init__(self, host: ExpertCache, device: ExpertCache) -> None:
        self.slots: SlotTable = host.slots
        self.counters: Counters = host.counters
        self._host, self._device = host, device

    @property
    def guesses(self) -> Collection[ExpertKey]:
        """Experts whose reads ahead of time are under way or unused."""
        return self._host.guesses

    @property
    def ahead_bytes(self) -> int:
        """Bytes of reads ahead of time."""
        return self._host.ahead_bytes

    @property
    def slots_per_layer(self) -> int:
        """A layer's fair share of RAM."""
        return self._host.slots_per_layer

    def num_bytes(self, key: ExpertKey) -> int:
        """That reading `key` moves."""
        return self._host.num_bytes(key)

    def is_ready(self, key: ExpertKey) -> bool:
        """In RAM or on the device."""
        return self._host.is_ready(key) or self._device.is_ready(key)

    def is_coming(self, key: ExpertKey) -> bool:
        """On its way to RAM or to the device."""
        return self._host.is_coming(key) or self._device.is_coming(key)

    def start_ahead(self, key: ExpertKey, *, keep: Collection[ExpertKey]) -> bool:
        """Begin reading."""
        return self._host.start_ahead(key, keep=keep)

    def cancel_ahead(self, key: ExpertKey) -> bool:
        """Take a read back."""
        return self._host.cancel_ahead(key)

    def expire_ahead(self, layer_idx: int, needed: Collection[ExpertKey]) -> None:
        """Whatever else was read ahead for this layer was for nothing."""
        self._host.expire_ahead(layer_idx, needed)

    def poll(self) -> None:
        """Settle what has arrived in RAM: it becomes READY."""
        self._host.poll()


class TwoTierPrefetcher:
    """Stands where a `PrefetchController` does. `over_link` fetches to the device, `from_disk` to RAM.

    How long the disk was waited for is read off the counters at the end of a pass: by then also for what the CPU
    computed.
    """

    def __init__(
        self, over_link: PrefetchController, from_disk: PrefetchController, *, host: ExpertCache, counters: Counters
    ) -> None:
        """`from_disk` fills `host`. `counters` are those of the whole, with the stall for the disk."""
        self.over_link, self.from_disk = over_link, from_disk
        self._host, self._counters = host, counters
        self._told_ns = counters.disk_stall_ns

    def __repr__(self) -> str:
        return f"<TwoTierPrefetcher [link: {self.over_link!r} | disk: {self.from_disk!r}]>"

    @property
    def ab_tests(self) -> list[ABTest[int]]:
        """The comparisons of both, the link's first."""
        return [*self.over_link.ab_tests, *self.from_disk.ab_tests]

    @property
    def is_idle(self) -> bool:
        """Neither has anything wanted, pending, or to be predicted before the next prompt."""
        return self.over_link.is_idle and self.from_disk.is_idle

    def is_on(self, distance: int = 1) -> bool:
        """True when either would act upon a prediction."""
        return self.over_link.is_on(distance) or self.from_disk.is_on(distance)

    def request(
        self, layer_idx: int, expert_ids: Iterable[int], *, distance: int, whole_layer: bool = False,
        num_sure: int | None = None,
    ) -> None:  # fmt: skip
        """Both act upon it. A prefill that touches whole layers goes through RAM to the device anyway."""
        ids = list(expert_ids)
        if whole_layer or self.over_link.is_on(distance):
            self.over_link.request(layer_idx, ids, distance=distance, whole_layer=whole_layer, num_sure=num_sure)
        if not whole_layer:
            self.from_disk.request(layer_idx, ids, distance=distance, num_sure=num_sure)

    def router_spoke(self, layer_idx: int, expert_ids: Iterable[int]) -> None:
        """The layer runs now: before anything of it is used."""
        ids = list(expert_ids)
        self.over_link.router_spoke(layer_idx, ids)
        self.from_disk.router_spoke(layer_idx, ids)

    def demand_begins(self) -> None:
        """A computation is about to wait for the link. The drive may be idle."""
        self.over_link.demand_begins()

    def demand_ends(self, stall_ns: int = 0) -> None:
        """It waits no longer for the link."""
        self.over_link.demand_ends(stall_ns)

    def stall_measured(self, stall_ns: int) -> None:
        """Tell the link's controller; see `PrefetchController.stall_measured`."""
        self.over_link.stall_measured(stall_ns)

    def pump(self) -> None:
        """Start what may start. From disk nothing while something that is needed is read."""
        self.over_link.pump()
        if not self._host.is_demanded:
            self.from_disk.pump()

    def pass_ended(self, seconds: float, *, num_tokens: int = 1) -> None:
        """A forward pass took `seconds`."""
        told_ns, self._told_ns = self._told_ns, self._counters.disk_stall_ns
        self.from_disk.demand_ends(self._told_ns - told_ns)
        self.over_link.pass_ended(seconds, num_tokens=num_tokens)
        self.from_disk.pass_ended(seconds, num_tokens=num_tokens)

    def reset(self) -> None:
        """At rest, after a call was broken off, or a sequence ended."""
        self._told_ns = self._counters.disk_stall_ns
        self.over_link.reset()
        self.from_disk.reset()

    def as_dict(self) -> dict[str, object]:
        """Figures of the link's prefetcher, and under "disk" what RAM's does."""
        return {**self.over_link.as_dict(), "disk": self.from_disk.as_dict()}
