"""`offmoe probe`: measures this machine once, in some seconds, and keeps the figures for everything that plans."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from offmoe.checkpoint.gguf.file import SUFFIX
from offmoe.core.errors import CheckpointError, DeviceError
from offmoe.core.progress import Progress
from offmoe.kernels.cpu.loader import load_cpu_kernels
from offmoe.machine.memory import cpu_cache_bytes, num_cores
from offmoe.machine.record import DriveSpeed, MachineRecord, drive_key
from offmoe.probe import speeds
from offmoe.probe.layers import measure_costs
from offmoe.probe.sample_experts import best_s
from offmoe.tiers.device import Device
from offmoe.tiers.open_device import open_device

_COPIED_BYTES = 256 << 20


def run_probe(path: Path, *, baseline_bytes: int, progress: Progress, small: bool = False) -> MachineRecord:
    """All figures, with the drive that `path` is on. Memory counts from `baseline_bytes`.

    `small`: over little memory, for trying the code; the figures are then those of caches. Without a GPU, or with one
    that does not work, what needs it is left out.
    """
    steps = ("libraries and layers", "memory", *speeds.FORMATS, "drive", "device")

    def tell(name: str) -> None:
        progress("measuring", steps.index(name) + 1, len(steps))

    kernels, _ = load_cpu_kernels()
    try:
        tell("libraries and layers")
        costs = measure_costs(baseline_bytes, kernels)
        tell("memory")
        little = {"working_set": 1 << 20} if small else {}
        read = speeds.host_read(*((1 << 20,) if small else ()))
        latent_flops, latent_bytes = speeds.latent_speeds(kernels)
        cpu, flops = speeds.cpu_speeds(kernels, tell, **little)
        record = MachineRecord(
            name=f"this machine, {num_cores()} cores", ram_bytes=int(psutil.virtual_memory().total),
            num_cores=num_cores(), read_bytes_per_s=read, cpu_bytes_per_s=cpu, cpu_flops_per_s=flops,
            latent_flops_per_s=latent_flops, latent_bytes_per_s=latent_bytes,
            cached_bytes_per_s=max(costs.cached_bytes_per_s, cpu["bf16"]), cache_bytes=cpu_cache_bytes(),
            layers=costs.layers, cached_layers=costs.cached_layers,
            libraries_bytes=costs.libraries_bytes, pin_quota_bytes=_pin_quota(),
        )  # fmt: skip
        tell("drive")
        record = replace(record, drives=measure_drive(path))
        tell("device")
        return _with_device(record, kernels)
    finally:
        if kernels is not None:
            kernels.close()


def measure_drive(path: Path) -> dict[str, DriveSpeed]:
    """The drive that `path` (a model, or any file) is on, by its largest file. Empty without a file to read."""
    file = largest_file(path)
    if file is None:
        return {}
    try:
        return {drive_key(file): speeds.drive_speed(file)}
    except CheckpointError:
        return {}


def largest_file(path: Path) -> Path | None:
    """The largest file of a model, or `path` itself; None in a folder without one."""
    if path.is_file():
        return path
    files = [file for pattern in ("*.safetensors", f"*{SUFFIX}") for file in path.glob(pattern)]
    return max(files, key=lambda file: file.stat().st_size, default=None)


def _with_device(record: MachineRecord, kernels: Any) -> MachineRecord:
    """The link and the device's memory, where there is a CUDA device that works."""
    if not torch.cuda.is_available():
        return record
    try:
        device = open_device("cuda")
    except DeviceError:
        return record
    assert device is not None, "cuda was asked for"
    try:
        return _measure_device(record, device, kernels)
    finally:
        device.close()


def _measure_device(record: MachineRecord, device: Device, kernels: Any) -> MachineRecord:
    where = device.torch_device
    costs = speeds.link_costs(device.copier, where, kernels, lambda: torch.cuda.synchronize(where))
    src = torch.ones(_COPIED_BYTES, dtype=torch.uint8)
    there = torch.empty_like(src, device=where)

    def timed(work: Callable[[], object]) -> float:
        def all_done() -> None:
            work()
            torch.cuda.synchronize(where)

        return best_s(all_done)

    pageable = src.nbytes / timed(lambda: there.copy_(src))
    pinned = costs.link_bytes_per_s
    try:
        page_locked = src.pin_memory()
        pinned = src.nbytes / timed(lambda: there.copy_(page_locked, non_blocking=True))
    except RuntimeError:  # a refused pin: what the copier reached is what there is
        pinned = max(pinned, pageable)
    half = there[: _COPIED_BYTES // 2]
    within = 2 * half.nbytes / timed(lambda: there[_COPIED_BYTES // 2 :].copy_(half))
    small = torch.ones(8, dtype=torch.int64, device=where)
    return replace(
        record, device_name=device.name, vram_bytes=int(torch.cuda.get_device_properties(where).total_memory),
        device_bytes_per_s=within, device_layer_s=best_s(lambda: small.add_(1).tolist(), 50),
        link_pinned_bytes_per_s=pinned, link_pageable_bytes_per_s=pageable,
        link_beside_cpu_bytes_per_s=min(pinned, costs.link_beside_cpu_bytes_per_s),
        cpu_beside_link_bytes_per_s=costs.cpu_beside_link_bytes_per_s,
    )  # fmt: skip


def _pin_quota() -> int | None:
    """Bytes that this process may page-lock; None without a limit."""
    if os.name == "nt":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft in (resource.RLIM_INFINITY, 0) else soft
