"""The real executor, caches, lookahead, prefetcher and scheduler of misses on a machine in virtual time.

Copies are jobs on the machine's link, experts jobs on its device or its CPU; bytes are really moved and rows really
computed, so time and results are both checked. A slot holds NaN until its copy has ended.

Two kinds of device. `blocking`: like the CPU, a computation has ended when it returns, and a copy when it was waited
for. Otherwise like CUDA: both are queued behind each other on one stream, the host goes on, and waits only for the ids
that a router chose. There results are computed when they are queued, so what overlaps is checked by the times of the
jobs (`check_slots`).

Shapes: T tokens, D model width, K experts a token, S = T * K choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from executor_cases import MATH
from makers import MATRICES, WIDTH_D, TinyExperts
from two_tiers import TwoTiers, open_two_tiers
from virtual_machine import CancelledJobError, Job, Lane, Speeds, VirtualMachine

from offmoe.kernels.reference import ExpertMath
from offmoe.loader.look_ahead import most_ahead
from offmoe.machine.costs import Costs
from offmoe.moe.backends import Computed, ReferenceBackend
from offmoe.moe.cpu_experts import CpuExperts, Group
from offmoe.moe.executor import Executor
from offmoe.moe.misses import MissPlacer
from offmoe.moe.resident import preload
from offmoe.moe.stalls import StreamStalls
from offmoe.online.ab_test import Turns
from offmoe.placement.choose import PlacementMode
from offmoe.placement.scheduler import MissScheduler
from offmoe.prefetch.ahead import PrefetchCoordinator
from offmoe.prefetch.controller import PrefetchController, PrefetchMode
from offmoe.prefetch.lookahead import Lookahead
from offmoe.tiers.copier import CancelledMoveError, CopyPart, check_parts, count_bytes, move_bytes

POISON = 0xFF
# Bytes per second of the device's memory; other speeds are shares of it.
DEVICE_SPEED = 1e9
EXPERT_BYTES = 3 * 48 * 64 * 4


class Stream:
    """What was queued on the device, in order."""

    def __init__(self, machine: VirtualMachine, *, blocking: bool) -> None:
        self.machine, self.blocking = machine, blocking
        self.uses: list[tuple[int, bool, Job]] = []  # address of a slot, is it written, by which job; as queued
        self._waits_for: list[Job] = []

    def queue(self, num_bytes: float) -> Job:
        job = self.machine.device.submit(num_bytes, after=tuple(self._waits_for))
        self._waits_for = [job]
        if self.blocking:
            job.wait()
        return job

    def wait_for(self, copy: Job) -> None:
        """What is queued from now on begins after `copy`."""
        if self.blocking or copy.cancelled:
            copy.wait()
        else:
            self._waits_for.append(copy)

    def mark(self) -> Job | None:
        return None if self.blocking else self.queue(0)

    def moment(self) -> VirtualMoment:
        return VirtualMoment(self.queue(0))

    def synchronize(self) -> None:
        self.machine.wait(*self._waits_for)


@dataclass(frozen=True)
class VirtualMoment:
    """A point on the device's stream."""

    job: Job

    def ns_since(self, earlier: VirtualMoment) -> int | None:
        if self.job.end_s is None or earlier.job.end_s is None:
            return None
        return round((self.job.end_s - earlier.job.end_s) * 1e9)


@dataclass
class VirtualMove:
    """A copy on the link. Its bytes are there when it has ended (not blocking: for whatever is queued afterwards)."""

    stream: Stream
    parts: Sequence[CopyPart]
    job: Job
    delivered: bool = False

    def done(self) -> bool:
        ended = self.job.done()
        if ended and not self.job.cancelled:
            self._deliver()
        return ended

    def wait(self) -> None:
        try:
            self.stream.wait_for(self.job)
        except CancelledJobError:
            raise CancelledMoveError("the copy was taken back") from None
        self._deliver()

    def cancel(self) -> bool:
        return self.job.cancel()

    def promote(self) -> None:
        self.job.promote()

    def _deliver(self) -> None:
        if not self.delivered:
            self.delivered = True
            for src, dst in self.parts:
                move_bytes(src, dst)


class VirtualCopier:
    """Copies over the machine's link."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def copy(self, parts: Sequence[CopyPart], *, urgent: bool = True, after: object | None = None) -> VirtualMove:
        check_parts(parts)
        for _, dst in parts:
            dst.fill_(POISON)
        mark = () if after is None else (cast("Job", after),)
        job = self.stream.machine.link.submit(count_bytes(parts), urgent=urgent, after=mark)
        self.stream.uses.append((parts[0][1].data_ptr(), True, job))
        return VirtualMove(self.stream, parts, job)

    def mark(self) -> Job | None:
        return self.stream.mark()

    def restart(self) -> None:
        raise AssertionError("nothing is broken off here")

    def close(self) -> None:
        self.stream.machine.drain()


class VirtualRows:
    """Computes rows, and charges the device for reading the experts."""

    def __init__(self, stream: Stream, *, computes: bool = True) -> None:
        self._stream, self._computes = stream, computes
        self._reference = ReferenceBackend()

    def compute(
        self, layer_idx: int, math: ExpertMath, experts: list[Computed], x_TD: torch.Tensor, y_SD: torch.Tensor
    ) -> None:
        job = self._stream.queue(len(experts) * EXPERT_BYTES)
        if self._computes:
            self._reference.compute(layer_idx, math, experts, x_TD, y_SD)
        self._stream.uses += [(expert.weights.up[0].data_ptr(), False, job) for expert in experts]


class VirtualThread:
    """Computes groups of experts on the machine's CPU; the caller's thread does the work when it waits."""

    def __init__(self, lane: Lane, *, computes: bool = True) -> None:
        self._lane, self._computes = lane, computes

    def submit(self, function: Callable[[Group], Any], group: Group) -> VirtualFuture:
        job = self._lane.submit(len(group) * EXPERT_BYTES)
        nothing = (torch.empty(0, dtype=torch.long), torch.empty(0, WIDTH_D))
        return VirtualFuture(job, lambda: function(group) if self._computes else nothing)

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        pass


class VirtualFuture(Future[Any]):
    """A product on the CPU lane."""

    def __init__(self, job: Job, compute: Callable[[], Any]) -> None:
        super().__init__()
        self._job, self._compute = job, compute

    def result(self, timeout: float | None = None) -> Any:
        self._job.wait()
        return self._compute()

    def exception(self, timeout: float | None = None) -> None:
        self._job.wait()


@dataclass(frozen=True)
class Pass:
    """One forward pass: what each layer's router chooses, and what is guessed of it, (T, K) each."""

    ids: list[torch.Tensor]
    guesses: list[torch.Tensor]
    x_TD: torch.Tensor
    weights_TK: torch.Tensor


def make_pass(ids: list[torch.Tensor], guesses: list[torch.Tensor], seed: int) -> Pass:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(ids[0].shape[0], WIDTH_D, generator=generator)
    return Pass(ids, guesses, x_TD, torch.rand(ids[0].shape, generator=generator))


@dataclass(kw_only=True)
class Machine:
    """Speeds as shares of the device's, and how the device works. `predict_s`: of the host, to ask for one guess."""

    link: float = 0.5
    cpu: float = 0.5
    attention_s: float = 0.0
    predict_s: float = 0.0
    blocking: bool = True
    device_slots: int = 64
    chunks: int = 4
    top_k: int = 4
    computes: bool = True


@dataclass
class Engine:
    """What serves a model on a virtual device. `outputs`: of every layer of every pass, where rows are computed."""

    shape: Machine
    machine: VirtualMachine
    stream: Stream
    two: TwoTiers
    executor: Executor
    ahead: PrefetchCoordinator | None = None
    scheduler: MissScheduler | None = None
    prefetcher: PrefetchController | None = None
    outputs: list[torch.Tensor] = field(default_factory=list)
    now: Pass | None = None

    def run(self, passes: Sequence[Pass]) -> float:
        """Seconds that they took, until the device has ended them."""
        begin_s = self.machine.now_s
        for each in passes:
            self.run_pass(each)
        self.stream.synchronize()
        return self.machine.now_s - begin_s

    def run_pass(self, each: Pass) -> None:
        self.now = each
        lookahead = self.ahead.lookahead if self.ahead is not None else None
        for layer_idx, ids_TK in enumerate(each.ids):
            if lookahead is not None and self.stream.blocking:
                lookahead.observe_input(layer_idx, each.x_TD)
            self.stream.queue(self.shape.attention_s * DEVICE_SPEED)
            if lookahead is not None:
                lookahead.observe_state(layer_idx, each.x_TD if self.stream.blocking else each.x_TD.to("meta"))
            self._learn_ids(each)
            y_TD = self.executor.run_layer(layer_idx, MATH, self.num_experts, each.x_TD, ids_TK, each.weights_TK)
            if self.shape.computes:
                self.outputs.append(y_TD)

    def _learn_ids(self, each: Pass) -> None:
        """The host waits for what the router chose. Not blocking: as `Executor` does for ids that are on a device."""
        self.stream.synchronize()
        self.executor.read_stalls()
        for layer_idx in self.ahead.pending() if self.ahead is not None else ():
            assert self.ahead is not None
            self.ahead.take(layer_idx, each.guesses[layer_idx].tolist())

    @property
    def num_experts(self) -> int:
        return self.two.experts.layers[0].num_experts

    @property
    def num_layers(self) -> int:
        return len(self.two.experts.layers)

    def guess(self, layer_idx: int, state_TD: torch.Tensor) -> torch.Tensor:
        """On the state's device, which is not the host where ids come later."""
        assert self.now is not None
        self.machine.advance(self.shape.predict_s)
        return self.now.guesses[layer_idx].to(state_TD.device)

    def check_slots(self) -> None:
        """By the times of the jobs: nothing computed before its copy had ended, no slot overwritten while in use."""
        self.machine.drain()
        copied: dict[int, float] = {}
        read: dict[int, float] = {}
        for slot, is_written, job in self.stream.uses:
            if not job.cancelled:
                assert job.begin_s is not None and job.end_s is not None
                assert job.begin_s >= copied.get(slot, 0.0), f"{job=}"
                if is_written:
                    assert job.begin_s >= read.get(slot, 0.0), f"{job=}"
                    copied[slot] = job.end_s
                else:
                    read[slot] = max(read.get(slot, 0.0), job.end_s)


@contextmanager
def open_engine(
    tiny: TinyExperts, shape: Machine, *, prefetch: PrefetchMode = "off", miss: PlacementMode = PlacementMode.STREAM,
    take_turns: bool = True, error: float = 1.0,
) -> Iterator[Engine]:  # fmt: skip
    """All experts are in RAM, none on the device; the clock is at zero. The scheduler is told that the link is
    `error` times as fast as it is, and the CPU as much slower.
    """
    link, cpu = shape.link * DEVICE_SPEED, shape.cpu * DEVICE_SPEED
    speeds = Speeds(link=link, cpu=cpu, device=DEVICE_SPEED, link_beside_cpu=link / 1.15, cpu_beside_link=cpu / 1.3)
    machine = VirtualMachine(speeds, chunk_bytes=EXPERT_BYTES / shape.chunks)
    stream = Stream(machine, blocking=shape.blocking)
    num_experts = len(tiny.tensors) // len(MATRICES)
    with open_two_tiers(
        tiny, VirtualCopier(stream), host_slots=num_experts, device_slots=shape.device_slots,
    ) as two:  # fmt: skip
        preload(two.host, list(two.experts.keys()), lambda done, total: None)
        rows = VirtualRows(stream, computes=shape.computes)
        stalls = None if shape.blocking else StreamStalls(stream.moment)
        executor = Executor(
            two.cache, rows=rows, over_link=True, stalls=stalls, clock_ns=lambda: int(machine.now_s * 1e9)
        )
        engine = Engine(shape, machine, stream, two, executor)
        if miss is not PlacementMode.STREAM:
            _place_misses(engine, miss, error)
        if prefetch != "off":
            _fetch_ahead(engine, prefetch)
        trial = engine.prefetcher.trial if engine.prefetcher is not None else None
        if take_turns and engine.scheduler is not None and trial is not None:
            trial.turns = engine.scheduler.trial.turns = Turns(trial)
        yield engine
        machine.drain()
        two.link.poll()
        two.cache.poll()
        two.assert_at_rest()


def _place_misses(engine: Engine, mode: PlacementMode, error: float) -> None:
    """As loader/serving.py does."""
    speeds, two = engine.machine.speeds, engine.two
    assert speeds.link_beside_cpu is not None and speeds.cpu_beside_link is not None
    costs = Costs(
        link_bytes_per_s=speeds.link * error, link_beside_cpu_bytes_per_s=speeds.link_beside_cpu * error,
        cpu_bytes_per_s=speeds.cpu / error, cpu_beside_link_bytes_per_s=speeds.cpu_beside_link / error,
        disk_bytes_per_s=speeds.disk, cpu_flops_per_s=1e15,
    )  # fmt: skip
    engine.executor.cpu = cpu = CpuExperts(two.host, two.link.settle)
    cpu.close()
    cpu._thread = cast("Any", VirtualThread(engine.machine.cpu, computes=engine.shape.computes))
    engine.scheduler = MissScheduler(costs, mode=mode, clock=engine.machine.clock)
    engine.executor.placer = MissPlacer(engine.scheduler, two.cache, two.host, bytes_per_weight=4)


def _fetch_ahead(engine: Engine, mode: PrefetchMode) -> None:
    """As loader/serving.py does."""
    two, num_layers = engine.two, engine.num_layers
    num_ahead = most_ahead(two.cache.num_slots, engine.shape.top_k, from_disk=False)
    prefetcher = PrefetchController(two.cache, budget_bytes=num_ahead * EXPERT_BYTES, mode=mode)
    engine.prefetcher = prefetcher
    lookahead = Lookahead(
        [partial(engine.guess, layer_idx) for layer_idx in range(num_layers)], prefetcher, order=range(num_layers),
        num_experts=[engine.num_experts] * num_layers, distance=mode if isinstance(mode, int) else 1,
    )  # fmt: skip
    clock = engine.machine.clock
    engine.ahead = engine.executor.ahead = PrefetchCoordinator(
        lookahead, prefetcher, order=range(num_layers), clock=clock
    )
