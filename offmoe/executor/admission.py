"""Which experts served by the CPU are copied to the device as well, in the background, so that its cache adapts.

Such a copy saves nothing now, and slows the CPU while it runs. It pays when the expert is used often enough before it
is evicted. So the bytes are paced: a bucket is refilled with a share of the time in which the link is idle, and the
share follows from what became of the copies admitted so far.
"""

from __future__ import annotations

from collections.abc import Sequence

from offmoe.base.costs import Costs
from offmoe.base.keys import ExpertKey

# Share of the link's idle time: while copies do not pay (enough to notice when they do), and when they clearly pay.
MIN_SHARE, MAX_SHARE = 0.01, 0.25
# Gain over cost from which the largest share is granted; below 1 only the smallest.
CLEAR_GAIN = 2.0
# Weight of one more copy's fate in the share that was used, and the share assumed at first: hopeful, since a cache that
# is filled slowly costs more than some copies in vain.
FATE_WEIGHT, HOPED_SHARE = 1 / 32, 0.75
# What the bucket holds at most, in experts: copies admitted at once wait behind each other.
BURST = 4
# An expert is copied when the CPU has served it this often of late; counts are halved after so many served experts.
MIN_SERVED, HALVE_AFTER = 2, 2048


class Admission:
    """A byte budget for background copies. No clock of its own: `refill` tells it what time the link had."""

    def __init__(self, *, expert_bytes: int) -> None:
        self.admitted_bytes = 0
        self.used_share = HOPED_SHARE
        self._expert_bytes = expert_bytes
        self._bucket_bytes = float(BURST * expert_bytes)
        self._served: dict[ExpertKey, int] = {}
        self._num_served = 0
        self._pending: set[ExpertKey] = set()

    def __repr__(self) -> str:
        return f"<Admission [{self.admitted_bytes} bytes admitted, {self.used_share:.2f} used]>"

    def refill(self, idle_s: float, costs: Costs) -> None:
        """The link was idle for `idle_s`: a share of that may be used later."""
        gained = self.pace(costs) * idle_s * costs.link_beside_cpu_bytes_per_s
        self._bucket_bytes = min(BURST * self._expert_bytes, self._bucket_bytes + gained)

    def pace(self, costs: Costs) -> float:
        """Share of the link's idle time that may be used.

        A copy that is used with probability p, again and again, serves p / (1 - p) calls. Each saves the CPU's time
        for the expert; the copy itself takes the CPU what it is slowed by meanwhile.
        """
        saved_s = self.used_share / max(1e-6, 1 - self.used_share) / costs.cpu_bytes_per_s
        slowed_s = (1 - 1 / costs.cpu_slowdown) / costs.link_beside_cpu_bytes_per_s
        gain = saved_s / slowed_s if slowed_s > 0 else CLEAR_GAIN
        return min(MAX_SHARE, MIN_SHARE + max(0.0, gain - 1) / (CLEAR_GAIN - 1) * (MAX_SHARE - MIN_SHARE))

    def admit(self, served: Sequence[ExpertKey], num_bytes: int) -> list[ExpertKey]:
        """The CPU has served these experts of `num_bytes` each: those to be copied now, most served first."""
        for key in served:
            self._served[key] = self._served.get(key, 0) + 1
        self._num_served += len(served)
        if self._num_served >= HALVE_AFTER:
            self._num_served = 0
            self._served = {key: count // 2 for key, count in self._served.items() if count > 1}
        admitted = []
        for key in sorted(served, key=lambda key: (-self._served.get(key, 0), key)):
            if self._bucket_bytes < num_bytes or self._served.get(key, 0) < MIN_SERVED:
                break
            self._bucket_bytes -= num_bytes
            self.admitted_bytes += num_bytes
            self._pending.add(key)
            admitted.append(key)
        return admitted

    def refused(self, key: ExpertKey, num_bytes: int) -> None:
        """The cache had no slot for an admitted expert: its bytes were not copied."""
        if key in self._pending:
            self._pending.discard(key)
            self.admitted_bytes -= num_bytes
            self._bucket_bytes += num_bytes

    def used(self, key: ExpertKey) -> None:
        """A copy was found on the device by a later call; keys that were not admitted here are ignored."""
        self._judge(key, 1.0)

    def wasted(self, key: ExpertKey) -> None:
        """A copy was evicted or taken back before any use."""
        self._judge(key, 0.0)

    def _judge(self, key: ExpertKey, fate: float) -> None:
        if key in self._pending:
            self._pending.discard(key)
            self.used_share += FATE_WEIGHT * (fate - self.used_share)
