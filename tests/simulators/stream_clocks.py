"""What streams, events and the host know of each other, and which accesses to memory nothing puts in order.

Each stream has a vector clock. What is queued knows what the host knew by then, an event what its stream had been given
when it was recorded, and whoever waits for an event knows that too. Two accesses to one slot of a watched slab, one of
them writing, are a race when the later one does not know of the earlier one.
"""

from __future__ import annotations

import random
import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

Clock = Counter[str]
Span = tuple[int, int, bool]


def join(clock: Clock, other: Clock) -> None:
    for actor, count in other.items():
        clock[actor] = max(clock[actor], count)


class World:
    """`waits` counts what makes the host wait, by its place in offmoe or transformers; `races` are accesses."""

    def __init__(self, seed: int, late: float) -> None:
        self.waits: Counter[str] = Counter()
        self.races: list[str] = []
        self.host: Clock = Counter()
        self.main = Stream(name="main", world=self)
        self.per_thread = threading.local()
        self.lock = threading.RLock()
        self.random, self.late = random.Random(seed), late
        self.pinned: list[tuple[int, int]] = []
        self._slabs: list[tuple[int, int, int, str]] = []
        self._writer: dict[tuple[str, int], tuple[str, int]] = {}
        self._readers: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)

    @property
    def current(self) -> Stream:
        return getattr(self.per_thread, "stream", self.main)

    def watch(self, slab: torch.Tensor, slot_bytes: int, name: str) -> None:
        self._slabs.append((slab.data_ptr(), slab.nbytes, slot_bytes, name))

    @contextmanager
    def kernel(self) -> Iterator[None]:
        """What happens within plays a kernel: it reads numbers on the device, and the host does not wait for them."""
        before = getattr(self.per_thread, "in_kernel", False)
        self.per_thread.in_kernel = True
        try:
            yield
        finally:
            self.per_thread.in_kernel = before

    def wait(self, what: str) -> None:
        if getattr(self.per_thread, "in_kernel", False):
            return
        self.waits[f"{what} in {where()}"] += 1
        with self.lock:
            join(self.host, self.current.clock)

    def on_stream(self, *spans: Span) -> None:
        with self.lock:
            stream = self.current
            join(stream.clock, self.host)
            stream.clock[stream.name] += 1
            self._touch(stream.name, stream.clock, spans)

    def on_host(self, *spans: Span) -> None:
        with self.lock:
            self.host["host"] += 1
            self._touch("host", self.host, spans)

    def _touch(self, actor: str, clock: Clock, spans: tuple[Span, ...]) -> None:
        for begin, end, writes in spans:
            for slab, num_bytes, slot_bytes, name in self._slabs:
                if begin >= slab + num_bytes or end <= slab:
                    continue
                for slot in range(max(0, begin - slab) // slot_bytes, (end - slab - 1) // slot_bytes + 1):
                    self._touch_slot((name, slot), actor, clock, writes=writes)

    def _touch_slot(self, slot: tuple[str, int], actor: str, clock: Clock, *, writes: bool) -> None:
        before = dict([self._writer[slot]]) if slot in self._writer else {}
        before |= self._readers[slot] if writes else {}
        for other, count in before.items():
            if other != actor and clock[other] < count:
                self.races.append(f"{slot}: {actor} {'writes' if writes else 'reads'} beside {other}, in {where()}")
        if writes:
            self._writer[slot] = (actor, clock[actor])
            self._readers[slot] = {}
        else:
            self._readers[slot][actor] = clock[actor]

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return any(begin <= tensor.data_ptr() < end for begin, end in self.pinned)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
        return tensor


class Stream:
    """In place of torch.cuda.Stream."""

    def __init__(self, device: object = None, priority: int = 0, *, name: str = "", world: World | None = None) -> None:
        self.world = world or present()
        self.name, self.clock = name or f"side {priority}", Counter[str]()

    def wait_event(self, event: Event) -> None:
        with self.world.lock:
            join(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        with self.world.lock:
            join(self.clock, other.clock)

    def synchronize(self) -> None:
        with self.world.lock:
            join(self.world.host, self.clock)


class Event:
    """Stand-in for torch.cuda.Event. Late events are not done at first sight. Each copy in between takes 1 ms."""

    def __init__(self, blocking: bool = False, enable_timing: bool = False) -> None:
        self.clock, self._late, self._has_time = Counter[str](), 0, enable_timing

    def record(self, stream: Stream) -> None:
        world = present()
        with world.lock:
            join(stream.clock, world.host)
            stream.clock[stream.name] += 1
            self.clock = Counter(stream.clock)
            self._late = world.random.randint(1, 4) if world.random.random() < world.late else 0

    def query(self) -> bool:
        self._late -= 1
        if self._late < 0:
            self.synchronize()
        return self._late < 0

    def synchronize(self) -> None:
        world = present()
        with world.lock:
            join(world.host, self.clock)

    def elapsed_time(self, end: Event) -> float:
        assert self._has_time and end._has_time, "an event without a time"
        assert self._late < 0 or end._late < 0, "not passed yet"
        return float(sum(end.clock[name] - self.clock[name] for name in end.clock if name.startswith("side")))


def where() -> str:
    frames = [f for f in traceback.extract_stack() if "/offmoe/" in f.filename or "/transformers/" in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-4:]))


_present: list[World] = []


def present() -> World:
    return _present[-1]


def enter(world: World) -> None:
    _present.append(world)


def leave() -> None:
    _present.pop()
