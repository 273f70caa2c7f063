"""Choice of where each missed expert of a layer is computed: copied to the device, or on the CPU where it lies.

Plain arithmetic on costs, no torch. Link and CPU work side by side, so the question is how many are copied; every
number is tried, and the one that ends first is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import accumulate

from offmoe.machine.costs import Costs

# A copy under way is given up for the CPU only where that ends the layer in less than this share of the time: what has
# been copied would be lost, and the expert is one that lookahead wants on the device.
GIVE_UP_SHARE = 0.5


class PlacementMode(Enum):
    """`miss=` of the configuration. STREAM and CPU force every miss that has a choice."""

    AUTO = "auto"
    STREAM = "stream"
    CPU = "cpu"


class Placement(Enum):
    """Treatment of a missed expert."""

    FETCH = "fetch"
    CPU = "cpu"


class Where(Enum):
    """Place of a missed expert's bytes."""

    HOST = "host"
    COMING = "coming"
    DISK = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """An expert that a layer call needs and that is not READY on the device.

    `copy_left_bytes`: what is left of a prefetch to the device that is under way, None without one. `read_left_bytes`:
    what is left to read from disk (COMING), all of it by default. `worth` orders equals: how much the cache wants it.
    """

    num_bytes: int
    num_rows: int = 1
    flops_per_row: float = 0.0
    where: Where = Where.HOST
    read_left_bytes: int | None = None
    copy_left_bytes: int | None = None
    worth: float = 0.0

    @property
    def flops(self) -> float:
        """Operations for all its rows."""
        return self.num_rows * self.flops_per_row

    @property
    def is_under_way(self) -> bool:
        """A prefetch to the device has been started."""
        return self.copy_left_bytes is not None

    @property
    def link_bytes(self) -> int:
        """Bytes that are left to copy."""
        return self.num_bytes if self.copy_left_bytes is None else self.copy_left_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes that are left to read."""
        if self.where is Where.HOST:
            return 0
        return self.num_bytes if self.read_left_bytes is None else self.read_left_bytes


def decide(misses: Sequence[Miss], costs: Costs, mode: PlacementMode) -> list[Placement]:
    """A placement for each miss, in the order given.

    A copy that is under way is waited for: it is computed on the CPU only in AUTO, where waiting would take far longer
    (GIVE_UP_SHARE). Of the others those are copied that the cache would keep: most rows, then most worth, then first.
    """
    if mode is not PlacementMode.AUTO:
        return [Placement.FETCH if m.is_under_way or mode is PlacementMode.STREAM else Placement.CPU for m in misses]
    if misses and all(miss == misses[0] for miss in misses):  # decoding, most of the time
        num_copied = _num_copied_of_equals(misses[0], len(misses), costs)
        return [Placement.FETCH] * num_copied + [Placement.CPU] * (len(misses) - num_copied)
    order = sorted(range(len(misses)), key=lambda idx: preference(misses[idx]))
    num_copied = _num_copied([misses[idx] for idx in order], costs)
    placements = [Placement.CPU] * len(misses)
    for idx in order[:num_copied]:
        placements[idx] = Placement.FETCH
    return placements


def preference(miss: Miss) -> tuple[float, ...]:
    """Sort key: who is copied first."""
    under_way = miss.copy_left_bytes if miss.copy_left_bytes is not None else float("inf")
    return (under_way, -miss.num_rows, -miss.worth, miss.disk_bytes)


def makespan_s(misses: Sequence[Miss], placements: Sequence[Placement], costs: Costs) -> float:
    """Seconds until the last miss is on the device or computed, when all begin now (a lower bound with disk reads)."""
    order = sorted(range(len(misses)), key=lambda idx: placements[idx] is not Placement.FETCH)
    num_copied = sum(placement is Placement.FETCH for placement in placements)
    return _split_times([misses[idx] for idx in order], costs, only=num_copied)[0]


def _num_copied(ordered: list[Miss], costs: Costs) -> int:
    """Number of the first that are copied. Of equal times the one with most copies: copies serve later passes too."""
    times = _split_times(ordered, costs)
    num_under_way = sum(miss.is_under_way for miss in ordered)
    best = min(range(num_under_way, len(times)), key=lambda k: (times[k], -k))
    given_up = min(range(num_under_way + 1), key=lambda k: (times[k], -k))
    return given_up if times[given_up] < GIVE_UP_SHARE * times[best] else best


@lru_cache(maxsize=256)
def _num_copied_of_equals(miss: Miss, num: int, costs: Costs) -> int:
    return _num_copied([miss] * num, costs)


def _split_times(ordered: Sequence[Miss], costs: Costs, *, only: int | None = None) -> list[float]:
    """Seconds when the first k are copied and the others computed on the CPU, for k = 0..n (or for `only`)."""
    num = len(ordered)
    link_s = [costs.link_s(miss.link_bytes) if miss.link_bytes else 0.0 for miss in ordered]
    cpu_s = [costs.cpu_s(miss.num_bytes, flops=miss.flops) for miss in ordered]
    link_until = [0.0, *accumulate(link_s)]
    cpu_until = [0.0, *accumulate(cpu_s)]
    reads_s = _arrivals(ordered, costs)
    times = []
    for k in range(num + 1) if only is None else (only,):
        cpu_sum = cpu_until[num] - cpu_until[k] + costs.cpu_latency_s if k < num else 0.0
        time = costs.side_by_side_s(link_until[k], cpu_sum)
        if reads_s is not None:
            time = max(time, _pipeline_s(reads_s[:k], link_s[:k]), _pipeline_s(reads_s[k:], cpu_s[k:]))
        times.append(time)
    return times


def _arrivals(ordered: Sequence[Miss], costs: Costs) -> list[float] | None:
    """When each miss is in RAM, None when all are: the drive reads what is under way first, then by preference."""
    if all(miss.where is Where.HOST for miss in ordered):
        return None
    arrivals = [0.0] * len(ordered)
    at = 0.0
    for idx in sorted(range(len(ordered)), key=lambda idx: _read_order(ordered[idx])):
        if ordered[idx].disk_bytes:
            at += costs.disk_s(ordered[idx].disk_bytes)
            arrivals[idx] = at
    return arrivals


def _read_order(miss: Miss) -> tuple[float, ...]:
    return (miss.where is not Where.COMING, *preference(miss))


def _pipeline_s(arrivals_s: Sequence[float], each_s: Sequence[float]) -> float:
    """When the last is through a stage that takes `each_s`, one at a time, as they arrive."""
    at = 0.0
    for arrival_s, seconds in sorted(zip(arrivals_s, each_s, strict=True)):
        at = max(at, arrival_s) + seconds
    return at
