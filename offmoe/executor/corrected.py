"""Costs, corrected by what real layer calls took."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

from offmoe.base.costs import Costs

# Weight of a new measurement once there are many; the first ones count for more.
WEIGHT = 1 / 8
# One measurement may claim at most this factor: a stall of a second is no news about bandwidth.
MAX_FACTOR = 4.0
# Shorter is not measured.
MIN_SECONDS = 1e-7
# Costs are published anew when a rate has moved by this factor: decisions are cached by them.
NEWS_FACTOR = 1.05


class _Rate:
    """A rate alone and beside the other side. While one of the two was hardly measured it moves with the other."""

    def __init__(self, alone: float, beside: float) -> None:
        self.alone, self.beside = alone, beside
        self._num_alone = self._num_beside = 0.0

    def measured(self, num_bytes: float, seconds: float, beside_s: float) -> None:
        """`num_bytes` took `seconds`, of which the other side worked too for the first `beside_s`."""
        share = min(1.0, beside_s / seconds)
        expected_s = num_bytes / self.beside
        if share < 1 and expected_s > beside_s:
            expected_s = beside_s + (num_bytes - beside_s * self.beside) / self.alone
        factor = max(-log(MAX_FACTOR), min(log(MAX_FACTOR), log(expected_s / seconds)))
        self._num_alone += 1 - share
        self._num_beside += share
        alone_weight, beside_weight = self._weight(1 - share, self._num_alone), self._weight(share, self._num_beside)
        alone_step = alone_weight + beside_weight / (1 + self._num_alone) ** 2
        beside_step = beside_weight + alone_weight / (1 + self._num_beside) ** 2
        self.alone *= exp(factor * min(1.0, alone_step))
        self.beside *= exp(factor * min(1.0, beside_step))
        if self.beside > self.alone:  # nothing is faster beside something: whoever was measured more just now is right
            self.alone = self.beside = self.beside if share > 1 / 2 else self.alone

    @staticmethod
    def _weight(share: float, num: float) -> float:
        return share * max(WEIGHT, 1 / (1 + num))


class CorrectedCosts:
    """`now` begins as what was calibrated and follows the measurements, in steps of NEWS_FACTOR."""

    def __init__(self, costs: Costs) -> None:
        self.now = costs
        self._link = _Rate(costs.link_bytes_per_s, costs.link_beside_cpu_bytes_per_s)
        self._cpu = _Rate(costs.cpu_bytes_per_s, costs.cpu_beside_link_bytes_per_s)

    def ran(self, *, link_bytes: float, link_s: float, cpu_bytes: float, cpu_s: float) -> None:
        """One layer call kept the link busy for `link_s` and the CPU for `cpu_s`, both from the same moment on.

        Whoever ended first ran beside the other all the time, the other one alone from then on.
        """
        for rate, num_bytes, seconds, other_s in (
            (self._link, link_bytes, link_s - self.now.link_latency_s, cpu_s),
            (self._cpu, cpu_bytes, cpu_s - self.now.cpu_latency_s, link_s),
        ):
            if num_bytes >= 1 and seconds >= MIN_SECONDS:
                rate.measured(num_bytes, seconds, min(seconds, other_s))
        self._publish()

    def _publish(self) -> None:
        now = self.now
        pairs = (
            (self._link.alone, now.link_bytes_per_s),
            (self._link.beside, now.link_beside_cpu_bytes_per_s),
            (self._cpu.alone, now.cpu_bytes_per_s),
            (self._cpu.beside, now.cpu_beside_link_bytes_per_s),
        )
        if any(not 1 / NEWS_FACTOR < new / old < NEWS_FACTOR for new, old in pairs):
            self.now = replace(
                now,
                link_bytes_per_s=self._link.alone,
                link_beside_cpu_bytes_per_s=self._link.beside,
                cpu_bytes_per_s=self._cpu.alone,
                cpu_beside_link_bytes_per_s=self._cpu.beside,
            )
