"""Plain integer counters of what the cache and the tiers did. Always on: each event is one addition."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True, kw_only=True)
class Counters:
    """Totals since the engine was loaded. Bytes are bytes, times are nanoseconds.

    One hit, late hit or miss is counted for each expert that one layer call needs, however many tokens chose it, in the
    tier that computes; `ram_hits` and `ram_misses` are those of RAM when it feeds a device. `disk_busy`: one read at
    least was under way. `stall`: the model waited for experts from disk, or for their copies over the link. `ahead`:
    fetched before a router had asked for it. `cpu_experts`: misses computed where they lie in RAM. `syncs`: times that
    the host waited for the device to learn what the routers said. `waiting_calls`: layer calls for which something was
    missing or late.
    """

    hits: int = 0
    late_hits: int = 0
    misses: int = 0
    ram_hits: int = 0
    ram_misses: int = 0
    evictions: int = 0
    disk_reads: int = 0
    disk_bytes: int = 0
    disk_busy_ns: int = 0
    disk_stall_ns: int = 0
    link_stall_ns: int = 0
    link_copies: int = 0
    link_bytes: int = 0
    cpu_experts: int = 0
    ahead_bytes: int = 0
    ahead_used_bytes: int = 0
    ahead_wasted_bytes: int = 0
    compute_ns: int = 0
    layer_calls: int = 0
    waiting_calls: int = 0
    syncs: int = 0

    def copy(self) -> Counters:
        """A snapshot, to subtract from a later one."""
        return Counters(**{field.name: getattr(self, field.name) for field in fields(self)})

    def minus(self, earlier: Counters) -> Counters:
        """Counts since the snapshot `earlier`."""
        return Counters(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    def plus(self, other: Counters) -> Counters:
        """Both together."""
        return Counters(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def lookups(self) -> int:
        """Experts asked for."""
        return self.hits + self.late_hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were in memory already; 0 when none was asked for."""
        return self.hits / self.lookups if self.lookups else 0.0

    def as_dict(self) -> dict[str, int]:
        """Name to value, for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
