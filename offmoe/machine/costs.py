"""Costs of moving and computing bytes on this machine.

A rate is measured alone and beside the other side: link and CPU share the RAM's bandwidth and slow each other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Rates in bytes per second, times in seconds. `beside` is a rate while the other side is working too.

    `cpu_flops_per_s` is what bounds the CPU when many rows use one expert; `cpu_latency_s` is paid once for each layer
    call that uses the CPU (its rows travel there and back), `link_latency_s` once for each copy.
    """

    link_bytes_per_s: float
    cpu_bytes_per_s: float
    link_beside_cpu_bytes_per_s: float
    cpu_beside_link_bytes_per_s: float
    disk_bytes_per_s: float
    cpu_flops_per_s: float
    link_latency_s: float = 0.0
    cpu_latency_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_time = field.name.endswith("latency_s")
            assert value >= 0 if is_time else value > 0, f"{field.name}={value}"
        assert self.link_beside_cpu_bytes_per_s <= self.link_bytes_per_s, f"{self=}"
        assert self.cpu_beside_link_bytes_per_s <= self.cpu_bytes_per_s, f"{self=}"

    @property
    def link_slowdown(self) -> float:
        """Factor by which a copy takes longer beside the CPU's work; 1 or more."""
        return self.link_bytes_per_s / self.link_beside_cpu_bytes_per_s

    @property
    def cpu_slowdown(self) -> float:
        """Factor by which the CPU takes longer beside a copy; 1 or more."""
        return self.cpu_bytes_per_s / self.cpu_beside_link_bytes_per_s

    def link_s(self, num_bytes: float, *, num_copies: int = 1) -> float:
        """Seconds to copy `num_bytes` to the device, alone."""
        return num_bytes / self.link_bytes_per_s + num_copies * self.link_latency_s

    def cpu_s(self, num_bytes: float, *, flops: float = 0.0) -> float:
        """Seconds to compute an expert of `num_bytes` on the CPU, alone, without `cpu_latency_s`."""
        return max(num_bytes / self.cpu_bytes_per_s, flops / self.cpu_flops_per_s)

    def disk_s(self, num_bytes: float) -> float:
        """Seconds to read `num_bytes` into RAM."""
        return num_bytes / self.disk_bytes_per_s

    def side_by_side_s(self, link_s: float, cpu_s: float) -> float:
        """Seconds until both have ended, when both begin now and would take `link_s` and `cpu_s` alone.

        Both are slowed until the shorter has ended; what is left of the longer runs alone.
        """
        link_slowed_s, cpu_slowed_s = link_s * self.link_slowdown, cpu_s * self.cpu_slowdown
        if link_slowed_s <= cpu_slowed_s:
            return cpu_s + link_slowed_s * (1 - 1 / self.cpu_slowdown)
        return link_s + cpu_slowed_s * (1 - 1 / self.link_slowdown)


class TokenSample(NamedTuple):
    """One decoded token: its time, how much of it was waiting for experts, the bytes that were waited for, and how
    many of its layer calls had to fetch something.
    """

    step_s: float
    stall_s: float
    fetched_bytes: int
    num_waiting: int
