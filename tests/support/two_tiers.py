"""RAM slots and device slots over a tiny checkpoint; the device is a second slab of RAM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from makers import RecordingDisk, TinyExperts, index_experts

from offmoe.cache.backing_store import DiskStore
from offmoe.cache.expert_cache import ExpertCache
from offmoe.cache.host_store import HostStore
from offmoe.cache.policy import make_policy
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.core.counters import Counters
from offmoe.core.keys import ExpertKey
from offmoe.formats.layout import device_slot_bytes, layout_of
from offmoe.tiers.copier import Copier
from offmoe.tiers.device import SimulatedDevice
from offmoe.tiers.host import HostPool


@dataclass(frozen=True)
class TwoTiers:
    """`cache` is the device's; `host` is the RAM cache below it."""

    tiny: TinyExperts
    index: CheckpointIndex
    experts: ExpertIndex
    disk: RecordingDisk
    host: ExpertCache
    cache: ExpertCache
    link: HostStore
    copier: Copier

    def assert_at_rest(self) -> None:
        """No hold and nothing on its way in either tier, once what the link still reads has ended."""
        self.link.poll()
        for cache in (self.cache, self.host):
            cache.slots.check_integrity()
            assert ", 0 filling," in repr(cache) and "| 0 held |" in repr(cache), repr(cache)

    def cached(self) -> set[ExpertKey]:
        return {key for key in self.experts.keys() if self.cache.is_ready(key)}  # noqa: SIM118 - a method, not a dict


@contextmanager
def open_two_tiers(
    tiny: TinyExperts,
    copier: Copier,
    *,
    host_slots: int,
    device_slots: int,
    disk_type: type[RecordingDisk] = RecordingDisk,
) -> Iterator[TwoTiers]:
    """Closed afterwards, the copier too."""
    index = CheckpointIndex.open(tiny.folder)
    experts, counters, host_counters = index_experts(index), Counters(), Counters()
    disk = disk_type(index.files, io="auto", counters=counters)
    host_pool = HostPool(num_slots=host_slots, slot_bytes=experts.slot_bytes(direct=disk.direct))
    host_source = DiskStore(experts, host_pool, disk)
    num_layers = len(experts.layers)
    host = ExpertCache(host_slots, num_layers, host_source, make_policy("lru"), host_counters)
    pool = SimulatedDevice(bytes_per_s=1e12).make_pool(device_slots, device_slot_bytes(experts))
    layouts = [layout_of(layer) for layer in experts.layers]
    link = HostStore(experts, layouts, host, host_source, pool, copier, counters)
    cache = ExpertCache(device_slots, num_layers, link, make_policy("lru"), counters)
    try:
        yield TwoTiers(tiny, index, experts, disk, host, cache, link, copier)
    finally:
        copier.close()
        disk.close()
        cache.close()
        host.close()
        pool.close()
        host_pool.close()
        index.close()
