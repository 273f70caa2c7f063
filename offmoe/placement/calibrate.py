"""Measures link and CPU at load, alone and side by side, in about 0.2 s: what the scheduler of misses begins with.

Concurrency. The copier carries on its own threads or streams; products are computed on the calling thread, as long as
copies are in flight. So nothing is started here that has to be ended, but copies, and those are waited for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import cycle

from offmoe.machine.costs import Costs
from offmoe.tiers.copier import Copier, CopyPart, Ticket, count_bytes

# Seconds of each of the three phases (link, CPU, both), and bytes of each: whichever is reached first ends it.
PHASE_S, PHASE_BYTES = 0.06, 1 << 30
# A copy this small takes the link's latency and next to nothing else.
SMALL_BYTES = 4096


def measure(
    copier: Copier, experts: Sequence[Sequence[CopyPart]], compute: Callable[[int], None], *,
    disk_bytes_per_s: float, cpu_flops_per_s: float, cpu_latency_s: float = 0.0,
    synchronize: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter,
    phase_s: float = PHASE_S, phase_bytes: int = PHASE_BYTES,
) -> Costs:  # fmt: skip
    """Costs of this machine.

    `experts`: for each of a few experts (better more than the CPU's caches hold) the copies that bring it from RAM to a
    device slot of its own; the slots' bytes are overwritten. `compute(idx)` computes expert `idx` for one token on the
    CPU. `synchronize` returns when the device has done all that was submitted. What is not measured here is handed in.
    """
    assert experts and all(experts), f"{len(experts)=}"
    probe = _Probe(copier, experts, compute, synchronize, clock, phase_s, phase_bytes)
    probe.warm_up()
    latency_s = probe.link_latency_s()
    link = probe.link_alone()
    cpu = probe.cpu_alone()
    link_beside, cpu_beside = probe.both()
    return Costs(
        link_bytes_per_s=link,
        cpu_bytes_per_s=cpu,
        link_beside_cpu_bytes_per_s=min(link, link_beside),
        cpu_beside_link_bytes_per_s=min(cpu, cpu_beside),
        disk_bytes_per_s=disk_bytes_per_s,
        cpu_flops_per_s=cpu_flops_per_s,
        link_latency_s=latency_s,
        cpu_latency_s=cpu_latency_s,
    )


class _Probe:
    """The three phases. Between them nothing is under way."""

    def __init__(
        self, copier: Copier, experts: Sequence[Sequence[CopyPart]], compute: Callable[[int], None],
        synchronize: Callable[[], None], clock: Callable[[], float], phase_s: float, phase_bytes: int,
    ) -> None:  # fmt: skip
        self._copier, self._experts, self._compute = copier, experts, compute
        self._synchronize, self._clock = synchronize, clock
        self._phase_s, self._phase_bytes = phase_s, phase_bytes
        self._bytes = [count_bytes(parts) for parts in experts]

    def warm_up(self) -> None:
        """First calls allocate, compile and fault pages in."""
        self._compute(0)
        self._end([self._copier.copy(self._experts[0])])

    def link_latency_s(self) -> float:
        """The shortest of a few small copies."""
        src, dst = self._experts[0][0]
        small = [(src.narrow(0, 0, min(SMALL_BYTES, src.nbytes)), dst.narrow(0, 0, min(SMALL_BYTES, dst.nbytes)))]
        times = []
        for _ in range(5):
            begin_s = self._clock()
            self._end([self._copier.copy(small)])
            times.append(self._clock() - begin_s)
        return min(times)

    def link_alone(self) -> float:
        """Bytes per second of copies, one queued behind the other."""
        begin_s = self._clock()
        return self._copy_while(begin_s, None) / max(self._clock() - begin_s, 1e-9)

    def cpu_alone(self) -> float:
        """Bytes per second of products."""
        begin_s = self._clock()
        num_bytes = 0
        for idx in cycle(range(len(self._experts))):
            self._compute(idx)
            num_bytes += self._bytes[idx]
            if self._is_over(begin_s, num_bytes):
                break
        return num_bytes / max(self._clock() - begin_s, 1e-9)

    def both(self) -> tuple[float, float]:
        """Bytes per second of copies and of products, while both go on."""
        order = cycle(range(len(self._experts)))
        computed, last_s = 0, self._clock()

        def compute() -> None:
            nonlocal computed, last_s
            idx = next(order)
            self._compute(idx)
            computed += self._bytes[idx]
            last_s = self._clock()

        begin_s = self._clock()
        copied = self._copy_while(begin_s, compute)
        return copied / max(self._clock() - begin_s, 1e-9), computed / max(last_s - begin_s, 1e-9)

    def _copy_while(self, begin_s: float, work: Callable[[], None] | None) -> int:
        """Copy expert after expert until the phase is over, doing `work` meanwhile; the bytes copied.

        A slot is copied to again only when its last copy is done. With nothing to do meanwhile, the oldest is waited
        for.
        """
        idle = deque(range(len(self._experts)))
        in_flight: deque[tuple[int, Ticket]] = deque()
        num_bytes = 0
        try:
            while True:
                # One at least: on a busy machine the phase may be over before it begins, and 0 bytes are no speed.
                while idle and not (num_bytes and self._is_over(begin_s, num_bytes)):
                    idx = idle.popleft()
                    in_flight.append((idx, self._copier.copy(self._experts[idx])))
                    num_bytes += self._bytes[idx]
                if not in_flight:
                    return num_bytes
                if work is not None:
                    work()
                else:
                    self._end([in_flight[0][1]])
                while in_flight and in_flight[0][1].done():
                    idle.append(in_flight.popleft()[0])
        finally:
            self._end([ticket for _, ticket in in_flight])

    def _is_over(self, begin_s: float, num_bytes: int) -> bool:
        return num_bytes >= self._phase_bytes or self._clock() - begin_s >= self._phase_s

    def _end(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            ticket.wait()
        self._synchronize()
