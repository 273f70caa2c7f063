"""A machine in virtual time: link, disk, CPU and device as lanes that slow each other, deterministic to the last bit.

A job is some bytes on one lane. Lanes run side by side; each carries one job at a time, urgent ones first, and looks
for a more urgent one between chunks. Speeds are constant between events, so time advances from event to event and
nothing is rounded to a tick. The clock moves only in `wait`, `advance` and `run_until`: code under test costs nothing.

    machine = VirtualMachine(Speeds(link=12e9, cpu=48e9, cpu_beside_link=40e9), chunk_bytes=2 << 20)
    ahead = machine.link.submit(9 << 20, urgent=False)
    copy = machine.link.submit(9 << 20)                       # overtakes `ahead` at the next chunk
    arrival = machine.device.submit(9 << 20, after=[copy])    # begins when the copy has ended
    work = machine.cpu.submit(18 << 20)
    machine.wait(arrival, work)
    machine.now_s, ahead.left_bytes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

INFINITE = float("inf")


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Bytes per second of each lane alone, and of link and CPU beside each other (None: not slowed)."""

    link: float = 12e9
    cpu: float = 48e9
    device: float = 200e9
    disk: float = 3e9
    link_beside_cpu: float | None = None
    cpu_beside_link: float | None = None
    link_latency_s: float = 0.0


class CancelledJobError(RuntimeError):
    """Waited for a job that was cancelled."""


class Job:
    """Some bytes on a lane; usable as a `Ticket`."""

    def __init__(self, lane: Lane, num_bytes: float, *, urgent: bool, after: Sequence[Job]) -> None:
        self.lane, self.num_bytes, self.left_bytes = lane, num_bytes, float(num_bytes)
        self.urgent, self.cancelled = urgent, False
        self.begin_s: float | None = None
        self.end_s: float | None = None
        self._after = after

    def __repr__(self) -> str:
        return f"<Job {self.lane.name} {self.num_bytes:.0f} bytes, {self.left_bytes:.0f} left, end {self.end_s}>"

    @property
    def is_eligible(self) -> bool:
        """Everything that it comes after has ended."""
        return all(job.done() for job in self._after)

    def done(self) -> bool:
        """True when it has ended, or was cancelled and no chunk of it is under way."""
        return self.end_s is not None or (self.cancelled and not self.lane.carries(self))

    def wait(self) -> None:
        """Move the clock to its end. Raises CancelledJobError."""
        self.lane.machine.wait(self)

    def cancel(self) -> bool:
        """Take back what has not begun: a chunk under way is carried to its end. False when nothing could be."""
        if self.done() or self.cancelled or not self.lane.take_back(self):
            return False
        self.cancelled = True
        self.lane.machine.settle()
        return True

    def promote(self) -> None:
        """Make it urgent, behind those that are."""
        if not self.urgent and not self.done() and not self.cancelled:
            self.urgent = True
            self.lane.requeue(self)


class Lane:
    """One resource. Jobs wait in order of submission, urgent before others."""

    def __init__(self, machine: VirtualMachine, name: str, speed: Callable[[], float], *, latency_s: float = 0.0,
                 chunk_bytes: float = INFINITE) -> None:  # fmt: skip
        self.machine, self.name, self.chunk_bytes = machine, name, chunk_bytes
        self.speed = speed
        self.busy_s = 0.0
        self.carried_bytes = 0.0
        self._latency_s = latency_s
        self._waiting: list[Job] = []
        self._current: Job | None = None
        self._chunk_left = 0.0
        self._latency_left = 0.0

    def __repr__(self) -> str:
        return f"<Lane {self.name} [{len(self._waiting)} waiting, busy {self.busy_s:.6f} s]>"

    @property
    def busy(self) -> bool:
        """A chunk is under way."""
        return self._current is not None

    @property
    def moving(self) -> bool:
        """A chunk is under way and past its latency: it slows the lanes beside it."""
        return self._current is not None and not self._latency_left

    @property
    def urgent_waiting(self) -> bool:
        """An urgent job is under way or waiting."""
        return any(job.urgent for job in self.jobs)

    @property
    def jobs(self) -> list[Job]:
        """Under way, then waiting."""
        return [*([self._current] if self._current is not None else []), *self._waiting]

    @property
    def queued_bytes(self) -> float:
        """What is left of everything submitted."""
        return sum(job.left_bytes for job in self.jobs)

    def carries(self, job: Job) -> bool:
        """A chunk of `job` is under way."""
        return job is self._current

    def submit(self, num_bytes: float, *, urgent: bool = True, after: Sequence[Job] = ()) -> Job:
        """Queue a job; it begins when `after` have ended and the lane comes to it."""
        assert num_bytes >= 0, f"{num_bytes=}"
        job = Job(self, num_bytes, urgent=urgent, after=after)
        self._waiting.append(job)
        if not self.busy:
            self.machine.settle()
        return job

    def requeue(self, job: Job) -> None:
        """Called by `promote`: to the end of the line."""
        if job in self._waiting:
            self._waiting.remove(job)
            self._waiting.append(job)

    def take_back(self, job: Job) -> bool:
        """Called by `cancel`: out of the line, or stop after the chunk under way when more would follow."""
        if job is self._current:
            return self._chunk_left < job.left_bytes
        self._waiting.remove(job)
        return True

    def pick(self) -> bool:
        """Begin a chunk when idle; True when one was begun."""
        if self._current is not None or not self._waiting:
            return False
        job = None
        for waiting in self._waiting:
            if (job is None or waiting.urgent) and waiting.is_eligible:
                job = waiting
                if job.urgent:
                    break
        if job is None:
            return False
        self._waiting.remove(job)
        self._current = job
        self._latency_left = self._latency_s if job.begin_s is None else 0.0
        if job.begin_s is None:
            job.begin_s = self.machine.now_s
        self._chunk_left = min(self.chunk_bytes, job.left_bytes)
        return True

    def time_to_event(self, speed: float) -> float:
        """Seconds until its latency is over or its chunk ends, at `speed`."""
        if self._current is None:
            return INFINITE
        return self._latency_left or self._chunk_left / speed

    def move(self, seconds: float, speed: float, *, to_event: bool) -> None:
        """Let `seconds` pass; with `to_event` exactly up to what `time_to_event` said."""
        job = self._current
        if job is None:
            return
        self.busy_s += seconds
        if self._latency_left:
            self._latency_left = 0.0 if to_event else self._latency_left - seconds
            return
        moved = self._chunk_left if to_event else min(self._chunk_left, seconds * speed)
        self._chunk_left -= moved
        self.carried_bytes += moved
        job.left_bytes -= moved
        if to_event:
            self._end_chunk(job)

    def _end_chunk(self, job: Job) -> None:
        self._current = None
        if job.cancelled:
            return
        if job.left_bytes > 1e-9 * job.num_bytes:
            # Before the others of its kind: chunks make room for more urgent jobs, not for later ones.
            self._waiting.insert(0, job)
        else:
            job.left_bytes, job.end_s = 0.0, self.machine.now_s


class VirtualMachine:
    """Lanes `disk`, `link`, `cpu`, `device` and a clock. `speeds` may be replaced at any time (drift, noise)."""

    def __init__(self, speeds: Speeds, *, chunk_bytes: float = INFINITE) -> None:
        self.now_s = 0.0
        self.speeds = speeds
        self.disk = Lane(self, "disk", lambda: self.speeds.disk, chunk_bytes=chunk_bytes)
        self.link = Lane(self, "link", self._link_speed, latency_s=speeds.link_latency_s, chunk_bytes=chunk_bytes)
        self.cpu = Lane(self, "cpu", self._cpu_speed)
        self.device = Lane(self, "device", lambda: self.speeds.device)
        self._lanes = (self.disk, self.link, self.cpu, self.device)

    def __repr__(self) -> str:
        return f"<VirtualMachine {self.now_s:.6f} s {self._lanes}>"

    def clock(self) -> float:
        """The time in seconds, to be injected where time.perf_counter would be read."""
        return self.now_s

    def wait(self, *jobs: Job) -> float:
        """Move the clock until all `jobs` have ended; the time then. Raises CancelledJobError, after all ended."""
        for job in jobs:
            while not job.done():
                assert self._step(INFINITE), f"{job} never ends: {self}"
        if any(job.cancelled for job in jobs):
            raise CancelledJobError("the job was cancelled")
        return self.now_s

    def advance(self, seconds: float) -> float:
        """Let time pass; the lanes work on."""
        return self.run_until(self.now_s + seconds)

    def run_until(self, time_s: float) -> float:
        """Move the clock to `time_s` (no-op when that is past)."""
        while self.now_s < time_s:
            if not self._step(time_s):
                self.now_s = time_s
        return self.now_s

    def drain(self) -> float:
        """Move the clock until no lane has anything to do."""
        while self._step(INFINITE):
            pass
        return self.now_s

    def settle(self) -> None:
        """Let idle lanes begin, and end jobs of no bytes (which may let others begin)."""
        while any(lane.pick() for lane in self._lanes):
            for lane in self._lanes:
                if lane.busy and lane.time_to_event(1.0) == 0.0:
                    lane.move(0.0, 1.0, to_event=True)

    def _step(self, limit_s: float) -> bool:
        """Advance to the next event or to `limit_s`; False when all lanes are idle."""
        speeds = [lane.speed() for lane in self._lanes]
        times = [lane.time_to_event(speed) for lane, speed in zip(self._lanes, speeds, strict=True)]
        seconds = min(times)
        if seconds == INFINITE:
            return False
        room = limit_s - self.now_s
        if seconds > room:
            self.now_s = limit_s
            for lane, speed in zip(self._lanes, speeds, strict=True):
                lane.move(room, speed, to_event=False)
            return True
        self.now_s += seconds
        for lane, speed, time in zip(self._lanes, speeds, times, strict=True):
            lane.move(seconds, speed, to_event=time == seconds)
        self.settle()
        return True

    def _link_speed(self) -> float:
        beside = self.speeds.link_beside_cpu
        return self.speeds.link if beside is None or not self.cpu.moving else beside

    def _cpu_speed(self) -> float:
        beside = self.speeds.cpu_beside_link
        return self.speeds.cpu if beside is None or not self.link.moving else beside
