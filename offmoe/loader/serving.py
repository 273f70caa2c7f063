"""Parts that serve a loaded model's experts: tiers, caches, executor, prefetching, and the scheduler of misses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from offmoe.cache.auto import AutoPolicy, choose_policy, policy_facts
from offmoe.cache.backing_store import BackingStore, DiskStore
from offmoe.cache.expert_cache import ExpertCache
from offmoe.cache.host_store import HostStore
from offmoe.cache.packing_store import PackingStore
from offmoe.cache.usage import Usage
from offmoe.cache.warm_start import WarmStart
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.core.config import EngineConfig
from offmoe.core.counters import Counters
from offmoe.core.keys import ExpertKey
from offmoe.formats.layout import layout_of
from offmoe.hf.internals import experts_modules
from offmoe.hf.seam import ExpertsExecutor, math_of
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.make_slot_kernels import make_slot_kernels
from offmoe.kernels.slot_kernels import SlotKernels
from offmoe.loader.costs import measure_miss_costs
from offmoe.loader.look_ahead import look_ahead
from offmoe.loader.packing import PackedSlots
from offmoe.memory.budget import MemoryPlan
from offmoe.moe.backends import ExpertBackend, KernelBackend, TokenRows
from offmoe.moe.cpu_backend import CpuBackend
from offmoe.moe.cpu_experts import CpuExperts
from offmoe.moe.executor import Executor
from offmoe.moe.interrupt_safe import InterruptSafeExecutor
from offmoe.moe.misses import MissPlacer
from offmoe.moe.resident import ResidentExecutor, preload
from offmoe.moe.stalls import StreamStalls
from offmoe.online.ab_test import ABTest, Turns
from offmoe.placement.choose import PlacementMode
from offmoe.placement.scheduler import MissScheduler
from offmoe.prefetch.ahead import PrefetchCoordinator
from offmoe.tiers.disk import DiskTier
from offmoe.tiers.host import HostPool
from offmoe.trace.recorder import Recorder

if TYPE_CHECKING:
    from offmoe.tiers.device import Device, DevicePool, Moment


@dataclass(kw_only=True)
class Serving:
    """The parts, for statistics and for `close`. `cache` is the tier that computes, `host` the RAM slots.

    `wide`: those that lie as they are stored, of experts that are kept packed; None where none is packed.
    """

    cache: ExpertCache
    host: ExpertCache
    executor: ExpertsExecutor
    ahead: PrefetchCoordinator | None = None
    placer: MissPlacer | None = None
    kernels: SlotKernels | None = None
    cpu_backend: CpuBackend | None = None
    warm: WarmStart | None = None
    wide: set[ExpertKey] | None = None
    recorder: Recorder = field(default_factory=Recorder)
    notes: list[str] = field(default_factory=list)
    closing: ExitStack = field(default_factory=ExitStack)
    read_stalls: Callable[[], None] = field(default=lambda: None)

    def stats(self) -> dict[str, Any]:
        """Record of prefetching and of the scheduler of misses, for `Engine.stats`."""
        self.read_stalls()
        found: dict[str, Any] = {"prefetch": self.ahead.as_dict() if self.ahead is not None else "off"}
        found |= policy_facts(self.cache.policy)
        if self.host is not self.cache:
            host = self.host.counters
            found |= {"ram_hits": host.hits, "ram_misses": host.misses, "ram_evictions": host.evictions}
            found |= {f"ram_{name}": fact for name, fact in policy_facts(self.host.policy).items()}
        if self.placer is not None:
            scheduler = self.placer.scheduler
            found |= {"miss": scheduler.mode.value, "miss_chosen": scheduler.trial.choice.value}
        if self.kernels is not None:
            found["kernels"] = sorted(set(self.kernels.reasons.values())) or "triton"
        if self.cpu_backend is None:
            found["cpu_kernels"] = ["torch"]
        else:
            found["cpu_kernels"] = [str(self.cpu_backend.kernels), *sorted(set(self.cpu_backend.reasons.values()))]
        found |= {"pack": "off"} if self.wide is None else {"pack": "on", "wide_experts": len(self.wide)}
        return found | ({"notes": self.notes} if self.notes else {})

    def close(self) -> None:
        """Threads and hooks first, then the views of the pools. What was used how often is kept for later runs."""
        self.closing.close()
        if self.warm is not None:
            self.warm.save(self.cache.policy.usage, self.host.policy.usage)
        self.cache.close()
        self.host.close()


def build_serving(
    model: PreTrainedModel, experts: ExpertIndex, disk: DiskTier, pool: HostPool, plan: MemoryPlan,
    config: EngineConfig, counters: Counters, *, cpu_kernels: CpuKernels | None = None, device: Device | None = None,
    device_pool: DevicePool | None = None, warm: WarmStart | None = None, packing: PackedSlots | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Serving:  # fmt: skip
    """Caches and executor over the given pools. Called when the resident weights are loaded and no executor attached.

    `progress(stage, done_bytes, total_bytes)`: of page-locking RAM slots, and of bringing all experts to a device that
    has room for them. Kernels that are compiled for the device are counted by number.
    """
    cpu_backend = None if cpu_kernels is None else CpuBackend(cpu_kernels)
    counted = {} if warm is None else warm.load()
    if device is None or device_pool is None:
        store = DiskStore(experts, pool, disk) if packing is None else PackingStore(experts, pool, disk, packing.packer)
        cache = make_cache(pool.num_slots, experts, store, counters, policy=config.policy, usage=Usage(counted))
        serving = Serving(cache=cache, host=cache, executor=_NOT_YET, cpu_backend=cpu_backend, warm=warm)
        if isinstance(store, PackingStore):
            store.take_next, serving.wide = cache.take_next, store.wide
        executor = Executor(cache, rows=cpu_backend, recorder=serving.recorder)
        _fetch_ahead(serving, executor, model, experts, config)
        serving.executor = InterruptSafeExecutor(executor)
        return serving
    host_source = DiskStore(experts, pool, disk)
    host = make_cache(
        pool.num_slots, experts, host_source, Counters(), policy=config.policy, usage=Usage(counted), listens=True
    )
    layouts = [layout_of(layer) for layer in experts.layers]
    link = HostStore(experts, layouts, host, host_source, device_pool, device.copier, counters)
    stalls = _stalls_of(device)
    cache = make_cache(device_pool.num_slots, experts, link, counters, policy=config.policy, usage=Usage(counted))
    serving = Serving(cache=cache, host=host, executor=_NOT_YET, cpu_backend=cpu_backend, warm=warm)
    maths = [math_of(module) for _, module in experts_modules(model)]
    slot_of_LE, missing_L = _slot_table(experts, device_pool)
    kernels = serving.kernels = make_slot_kernels(  # before RAM slots take pages: compilers need memory, too
        experts.layers, maths, device_pool.slab, device_pool.slot_bytes, slot_of_LE=slot_of_LE, missing_L=missing_L,
        progress=partial(progress, "compiling GPU kernels"),
    )  # fmt: skip
    if (refused := device.pin(pool.slab, partial(progress, "page-locking RAM slots"))) is not None:
        serving.notes.append(f"RAM slots are not pinned ({refused}): copies go through a staging ring")
    to_device = partial(progress, "experts to the device")
    all_fit = device_pool.num_slots >= experts.num_experts
    if all_fit and not config.placement_invariant:
        _make_resident(serving, experts, kernels, slot_of_LE, to_device)
        link.synchronize()  # what another stream computes later is not ordered behind the copies
        return serving
    if all_fit:  # through the same executor as where they do not: the kernels that look slots up round otherwise
        preload(cache, list(experts.keys()), to_device)
    executor = Executor(
        cache, rows=_rows(kernels, device_pool, one_path=config.placement_invariant),
        tokens=None if config.placement_invariant else TokenRows(kernels, slot_of_LE),
        recorder=serving.recorder, over_link=True, stalls=stalls, follow_stream=device.follow_stream,
    )  # fmt: skip
    serving.read_stalls = executor.read_stalls
    _place_misses(serving, executor, link, experts, maths, config, device, device_pool)
    _fetch_ahead(serving, executor, model, experts, config)
    _take_turns(serving)
    serving.executor = InterruptSafeExecutor(executor)
    return serving


def make_cache(
    num_slots: int, experts: ExpertIndex, source: BackingStore, counters: Counters, *, policy: str,
    usage: Usage | None = None, listens: bool = False,
) -> ExpertCache:  # fmt: skip
    """A cache of `num_slots` slots whose policy has the name `policy`. `listens`: only misses of a tier above come."""
    layers = experts.layers
    chosen = choose_policy(
        policy, num_slots, [layer.num_experts for layer in layers], [layer.expert_bytes for layer in layers],
        experts.top_k, usage=usage, listens=listens,
    )  # fmt: skip
    cache = ExpertCache(num_slots, len(layers), source, chosen, counters)
    if isinstance(chosen, AutoPolicy):
        cache.on_layer, cache.on_recover = chosen.layer_call, chosen.recover
    return cache


def _stalls_of(device: Device) -> StreamStalls | None:
    """The clock of a device whose stream waits while the host goes on; None where the host's own tells."""
    return None if device.moment() is None else StreamStalls(cast("Callable[[], Moment]", device.moment))


def _make_resident(
    serving: Serving, experts: ExpertIndex, kernels: SlotKernels, table_LE: torch.Tensor,
    progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Everything fits: bring it all to the device once, and let the kernels find it there by `table_LE`."""
    keys = list(experts.keys())
    preload(serving.cache, keys, progress)
    slot_of_LE = torch.full(table_LE.shape, -1, dtype=table_LE.dtype)
    for key in keys:
        slot = serving.cache.slots.find(key)
        assert slot is not None, f"{key=}"
        slot_of_LE[key.layer_idx, key.expert_idx] = slot
    table_LE.copy_(slot_of_LE)
    serving.executor = ResidentExecutor(serving.cache, kernels)


def _slot_table(experts: ExpertIndex, pool: DevicePool) -> tuple[torch.Tensor, torch.Tensor]:
    """slot_of_LE, -1 everywhere, and missing_L, zero, on the device: see make_slot_kernels."""
    num_layers, device = len(experts.layers), pool.slab.device
    most = max(layer.num_experts for layer in experts.layers)
    slot_of_LE = torch.full((num_layers, most), -1, dtype=torch.int32, device=device)
    return slot_of_LE, torch.zeros(num_layers, dtype=torch.int32, device=device)


def _rows(kernels: SlotKernels, pool: DevicePool, *, one_path: bool) -> ExpertBackend | None:
    """Kernels where they are faster than the reference: not on a device that is RAM."""
    if pool.slab.device.type == "cpu":
        return None
    return KernelBackend(kernels, one_path=one_path)


def _place_misses(
    serving: Serving, executor: Executor, link: HostStore, experts: ExpertIndex, maths: list[Any],
    config: EngineConfig, device: Device, pool: DevicePool,
) -> None:  # fmt: skip
    """Measure link and CPU where there is a choice, and let the scheduler decide. "stream" needs no CPU side."""
    mode = PlacementMode(config.miss)
    if mode is PlacementMode.STREAM:
        return
    cpu = executor.cpu = CpuExperts(serving.host, link.settle, serving.cpu_backend)
    serving.closing.callback(cpu.close)
    costs = measure_miss_costs(
        experts, maths, link, device.copier, cpu, num_device_slots=pool.num_slots, width_D=_width(experts)
    )
    serving.placer = executor.placer = MissPlacer(
        MissScheduler(costs, mode=mode), serving.cache, serving.host,
        bytes_per_weight=experts.layers[0].bytes_per_weight,
    )  # fmt: skip


def _width(experts: ExpertIndex) -> int:
    """The width of what experts are given."""
    layer = experts.layers[0]
    return layer.width(layer.up[0])


def _fetch_ahead(
    serving: Serving, executor: Executor, model: PreTrainedModel, experts: ExpertIndex, config: EngineConfig
) -> None:
    """Lookahead, unless the user says no, everything fits, or no layer's routing was understood."""
    found = look_ahead(model, experts, serving.cache, serving.host, config)
    if isinstance(found, str):
        serving.notes.append(found)
    elif found is not None:
        ahead, hooks = found
        serving.closing.callback(hooks.remove)
        serving.ahead = executor.ahead = ahead


def _take_turns(serving: Serving) -> None:
    """Misses and prefetching are not compared at the same time; prefetching first: it is off until it was compared."""
    trials: list[ABTest[Any]] = [] if serving.ahead is None else serving.ahead.ab_tests
    if serving.placer is not None:
        trials.append(serving.placer.scheduler.trial)
    if len(trials) > 1:
        turns = Turns(trials[0])
        for trial in trials:
            trial.turns = turns


class _NotYet:
    """Stands for the executor while it is being made."""

    def run_layer(self, *args: object) -> torch.Tensor:
        raise AssertionError("no executor was made")


_NOT_YET = cast("ExpertsExecutor", _NotYet())
