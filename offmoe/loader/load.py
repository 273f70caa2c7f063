"""From a folder to a model that runs: meta build, expert index, resident weights, memory plans, tiers, seam."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from offmoe.attention.sdpa import absorb_latents, attend_by_kernels
from offmoe.cache.warm_start import WarmStart
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.checkpoint.identity import model_hash
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.core.config import EngineConfig
from offmoe.core.progress import Progress
from offmoe.hf.device_failures import explained, release_unused
from offmoe.hf.replace import KernelLinear, ReplacedModules
from offmoe.hf.tokens.tokenizer import load_tokenizer, note_end_tokens
from offmoe.hf.torch_threads import keep_to_quota, spare_forked_children
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.loader import load_cpu_kernels
from offmoe.kv.probe import ModelProbe, probe_model
from offmoe.loader.budgets import Budgets, fit_to_free, shrink
from offmoe.loader.calls import CallBudget, guard_calls
from offmoe.loader.headers import HeadersRead, read_headers
from offmoe.loader.loaded import LoadedModel, attach_all
from offmoe.loader.packed_weights import WeightPacker
from offmoe.loader.packing import PackedSlots, choose_packing
from offmoe.loader.quantised_linears import QuantisedLinears
from offmoe.loader.resident import load_peak_bytes, load_resident
from offmoe.loader.serving import Serving, build_serving
from offmoe.machine.memory import give_back_freed_memory
from offmoe.machine.reservations import Reservation
from offmoe.memory.budget import MemoryPlan
from offmoe.tiers.host import HostPool

if TYPE_CHECKING:
    from offmoe.tiers.device import Device, DevicePool
# RAM slots where the device has room for every expert: as many reads as are in flight, and as many copies.
PASSING_SLOTS = 16


def load_model(
    folder: Path, config: EngineConfig, *, baseline_bytes: int, device: Device | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> LoadedModel:  # fmt: skip
    """Load `folder` under `config`'s budget, which counts from `baseline_bytes` of resident memory.

    `device` is used instead of the one that `config` names; it is closed with the model. Raises OffmoeError subclasses;
    whatever was opened or started is closed again on any failure.
    """
    spare_forked_children()
    keep_to_quota()
    with ExitStack() as opened:
        device = choose_device(config) if device is None else device
        if device is not None:
            opened.callback(device.close)
        cpu_kernels, why_no_kernels = load_cpu_kernels()
        progress("building the model from config and headers", 0, 0)
        built = read_headers(folder, config, opened, device)
        config, model, experts = built.config, built.model, built.experts
        tokenizer = load_tokenizer(folder, trust_remote_code=config.trust_remote_code)
        note_end_tokens(model, tokenizer)
        kept = None
        if device is None and cpu_kernels is not None:
            kept = QuantisedLinears(model, built.index, built.targets, cpu_kernels)
        with explained(device):
            reservation = Reservation(baseline_bytes)
            opened.callback(reservation.close)
            slot_bytes = experts.slot_bytes(direct=built.disk.direct)
            packing, unpacked = choose_packing(
                config.pack, experts, model.dtype, cpu_kernels, slot_bytes=slot_bytes, on_device=device is not None
            )
            packer = _weight_packer(built, cpu_kernels) if packing is not None and cpu_kernels is not None else None
            budgets = _budgets(built, kept, device, reservation, packing, packer, baseline_bytes=baseline_bytes)
            plan, probe = _read_weights(built, kept, device, budgets, packer, progress)
            device_pool = None
            if device is not None:
                plan, device_pool = _make_device_pool(plan, device, top_k=experts.top_k)
            native = None
            if device is None and cpu_kernels is not None:  # before lookahead asks the modules
                native = ReplacedModules(cpu_kernels)
                opened.callback(native.remove)
                native.replace(model)
            progress("preparing expert slots", 0, 0)
            pool = HostPool(num_slots=plan.num_slots, slot_bytes=plan.slot_bytes)
            serving = build_serving(
                model, experts, built.disk, pool, plan, config, built.counters, cpu_kernels=cpu_kernels, device=device,
                device_pool=device_pool, warm=_warm_start(folder, config, built.index, experts),
                packing=packing, progress=progress,
            )  # fmt: skip
        serving.notes += _notes(built, why_no_kernels) + ([] if unpacked is None else [unpacked])
        serving.closing.callback(reservation.close)
        if cpu_kernels is not None:
            serving.closing.callback(cpu_kernels.close)
        attach_all(model, serving.executor)
        if native is not None:
            _finish_modules(model, native, serving)
        in_ram = device is None
        budget = CallBudget(model, plan, built.context_length, baseline_bytes=baseline_bytes) if in_ram else None
        calls, remove_guard = guard_calls(model, folder, budget)
        serving.closing.callback(remove_guard)
        opened.pop_all()
    return LoadedModel(
        model=model, tokenizer=tokenizer, index=built.index, experts=experts, disk=built.disk,
        pools=(pool, device_pool), serving=serving, native=native, calls=calls, device=device, plan=plan, config=config,
        chunkable=probe.chunkable, layout=probe.layout,
    )  # fmt: skip


def _budgets(
    built: HeadersRead, kept: QuantisedLinears | None, device: Device | None, reservation: Reservation,
    packing: PackedSlots | None, packer: WeightPacker | None, *, baseline_bytes: int,
) -> Budgets:  # fmt: skip
    """Budgets, and the memory that the parts of the model take of them."""
    keys = built.expert_keys if kept is None else built.expert_keys | kept.keys
    return Budgets(
        built.model, built.experts, built.config, built.context_length,
        slot_bytes=built.experts.slot_bytes(direct=built.disk.direct) if packing is None else packing.slot_bytes,
        staging_bytes=0 if packing is None else packing.staging_bytes,
        load_bytes=load_peak_bytes(built.targets, keys, built.index, built.model.dtype), baseline_bytes=baseline_bytes,
        device=device, reservation=reservation, packer=packer,
    )  # fmt: skip


def _weight_packer(built: HeadersRead, kernels: CpuKernels) -> WeightPacker:
    return WeightPacker(built.model, kernels, routers={layer.num_experts for layer in built.experts.layers})


def _read_weights(
    built: HeadersRead, kept: QuantisedLinears | None, device: Device | None, budgets: Budgets,
    packer: WeightPacker | None, progress: Progress,
) -> tuple[MemoryPlan, ModelProbe]:  # fmt: skip
    """The resident weights in their places, and the memory that is left divided. `kept` stays as it is stored.

    `packer` packs them, where there is one.
    """
    model, index = built.model, built.index
    keys = built.expert_keys if kept is None else built.expert_keys | kept.keys
    budgets.refuse_hopeless()
    if kept is not None:
        kept.read(index)
    load_resident(
        model, index, built.mapping, built.targets, keys,
        lambda done, total: progress("resident weights", done, total),
        device=None if device is None else device.torch_device, packer=packer,
    )  # fmt: skip
    if packer is not None:
        budgets.weights_were_packed()
    progress("trying the model on a few tokens", 0, 0)
    probe = _probe(model, built.context_length, device)
    return budgets.plan(probe), probe


def _probe(model: PreTrainedModel, context_length: int, device: Device | None) -> ModelProbe:
    """The model's weights are there: what it does is checked and measured, and leaves no memory behind."""
    absorb_latents(model)
    probe = probe_model(model, context_length)
    release_unused(device)
    give_back_freed_memory()
    return probe


def _warm_start(
    folder: Path, config: EngineConfig, index: CheckpointIndex, experts: ExpertIndex
) -> WarmStart | None:  # fmt: skip
    if not config.warm_start:
        return None
    return WarmStart(model_hash(folder, index.stored), [layer.num_experts for layer in experts.layers])


def _notes(built: HeadersRead, why_no_kernels: str) -> list[str]:
    model, quantisation, left_out = built.model, built.quantisation, built.left_out.note()
    notes = [] if left_out is None else [left_out]
    if quantisation is not None and quantisation.quantises_activations:
        notes.append(
            f"the checkpoint asks for quantised activations ({quantisation.method}); offmoe reads its weights as "
            f"they are and computes in {str(model.dtype).removeprefix('torch.')}"
        )
    if why_no_kernels:
        notes.append(f"CPU kernels: {why_no_kernels}")
    return notes


def choose_device(config: EngineConfig) -> Device | None:
    """The device that `config` names; None for the CPU, which "auto" means where there is no CUDA.

    Raises DeviceError when there is none where one was asked for, by its name or by `vram`.
    """
    if config.device == "auto" and config.vram is None and not torch.cuda.is_available():
        return None
    from offmoe.tiers.open_device import open_device

    return open_device("cuda" if config.device == "auto" and config.vram is not None else config.device)


def _make_device_pool(plan: MemoryPlan, device: Device, *, top_k: int) -> tuple[MemoryPlan, DevicePool]:
    """The device pool, and the plan with the slots that it really has: others may take memory until this moment."""
    assert plan.device is not None
    fitting = fit_to_free(plan.device, device, top_k=top_k)
    pool = device.make_pool(fitting.num_slots, fitting.slot_bytes, min_slots=top_k)
    if pool.num_slots < fitting.num_slots:
        fitting = shrink(fitting, pool.num_slots)
    num_slots = plan.num_slots
    if pool.num_slots >= plan.num_experts:  # RAM is then only passed through
        num_slots = min(num_slots, PASSING_SLOTS)
    return dataclasses.replace(plan, device=fitting, num_slots=num_slots), pool


def _finish_modules(model: PreTrainedModel, native: ReplacedModules, serving: Serving) -> None:
    """Attention of one token by the kernels, too; until the engine is closed."""
    serving.closing.callback(native.remove)
    attention = attend_by_kernels(model, native.kernels)
    if attention is not None:
        serving.closing.callback(attention.close)
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    if serving.cpu_backend is not None and all(isinstance(module, KernelLinear) for module in linears):
        native.threads.begin(serving.cpu_backend.reasons, attends=attention is not None)
