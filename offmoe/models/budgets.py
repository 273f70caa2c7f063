"""What the user allows, divided: once before weights are read, to refuse in time, and once when they are there."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from offmoe.base.budget import (
    CUDA_CONTEXT_BYTES,
    CUDA_SLACK_BYTES,
    SLACK_BYTES,
    STAGING_BYTES,
    DevicePlan,
    MemoryPlan,
    allowed_vram,
    auto_ram,
    plan_device,
    plan_memory,
)
from offmoe.base.config import EngineConfig
from offmoe.base.errors import BudgetError
from offmoe.base.machine import available_ram_bytes, rss_bytes
from offmoe.base.units import format_bytes
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.formats.layout import device_slot_bytes
from offmoe.models.probe import ModelProbe, foresee_kv_bytes
from offmoe.models.resident import resident_bytes
from offmoe.models.workspace import choose_chunk, host_workspace_bytes, workspace_bytes

if TYPE_CHECKING:
    from offmoe.tiers.device import Device

# What libraries grow by when a model runs for the first time in a process (measured: 18 MiB).
FIRST_RUN_BYTES = 24 << 20


class Budgets:
    """Plans RAM, and the device where there is one. Made when the model is built and no weight is read."""

    def __init__(
        self, model: PreTrainedModel, experts: ExpertIndex, config: EngineConfig, context_length: int, *,
        slot_bytes: int, load_bytes: int, baseline_bytes: int, device: Device | None,
    ) -> None:  # fmt: skip
        """`slot_bytes` of a RAM slot; `load_bytes` pass through RAM at once on their way to `device`."""
        self._model, self._experts, self._config = model, experts, config
        self._context_length, self._slot_bytes, self._load_bytes = context_length, slot_bytes, load_bytes
        self._baseline_bytes, self._device = baseline_bytes, device
        self._ram = config.ram if config.ram is not None else baseline_room(baseline_bytes)
        self._resident_bytes = resident_bytes(model)
        self._runtime_bytes = max(0, rss_bytes() - baseline_bytes)
        self._free_bytes = device.free_bytes() if device is not None else 0
        on_cuda = device is not None and device.torch_device.type == "cuda"
        self._context_bytes = CUDA_CONTEXT_BYTES if on_cuda else 0
        self._slack_bytes = CUDA_SLACK_BYTES if on_cuda else 0

    def refuse_hopeless(self) -> None:
        """Raise BudgetError before gigabytes are read when the model cannot fit at its most modest."""
        chunk = min(self._context_length, self._config.prefill_chunk or self._choose_chunk(0))
        kv_bytes = foresee_kv_bytes(self._model, self._context_length)
        try:
            self._divide(kv_bytes, chunk)
        except BudgetError:
            self._runtime_bytes += FIRST_RUN_BYTES  # so that the budget in the message is one that works
            self._divide(kv_bytes, chunk)

    def plan(self, probe: ModelProbe) -> MemoryPlan:
        """The plan, now that the weights are loaded and the model has run once. Raises BudgetError.

        What others have taken of the device meanwhile is not planned with.
        """
        if self._device is not None:
            self._free_bytes = min(self._free_bytes, self._device.free_bytes() + self._resident_bytes)
        chunk = self._context_length
        if probe.chunkable:
            chunk = min(chunk, self._config.prefill_chunk or self._choose_chunk(self._room(probe.kv_bytes)))
        in_ram = self._device is None or self._device.torch_device.type == "cpu"  # a simulated device is in RAM
        self._runtime_bytes = max(0, rss_bytes() - self._baseline_bytes - (self._resident_bytes if in_ram else 0))
        plan = self._divide(probe.kv_bytes, chunk)
        if plan.device is not None and self._config.vram is not None and plan.device.vram_bytes < self._config.vram:
            warnings.warn(
                f"vram is {format_bytes(self._config.vram)}, the device has {format_bytes(plan.device.vram_bytes)} to "
                f"give: {plan.device.num_slots} expert slots",
                stacklevel=2,
            )
        return plan

    def _room(self, kv_bytes: int) -> int:
        """Bytes left, where the model computes, for a prefill chunk's workspace and more slots than the fewest."""
        slots = min(self._config.experts or self._experts.top_k, self._experts.num_experts)
        if self._device is None:
            taken = self._runtime_bytes + self._resident_bytes + SLACK_BYTES + kv_bytes + slots * self._slot_bytes
            return self._ram - taken
        allowed = allowed_vram(self._config.vram, self._free_bytes + self._context_bytes)
        taken = self._context_bytes + self._resident_bytes + self._slack_bytes + kv_bytes
        return allowed - taken - slots * device_slot_bytes(self._experts)

    def _choose_chunk(self, room_bytes: int) -> int:
        return choose_chunk(
            self._model, context_length=self._context_length, room_bytes=room_bytes, on_device=self._device is not None
        )

    def _divide(self, kv_bytes: int, chunk: int) -> MemoryPlan:
        if self._device is None:
            return plan_memory(
                ram_bytes=self._ram, runtime_bytes=self._runtime_bytes, resident_bytes=self._resident_bytes,
                kv_bytes=kv_bytes,
                workspace_bytes=workspace_bytes(self._model, chunk=chunk, context_length=self._context_length),
                slot_bytes=self._slot_bytes, num_experts=self._experts.num_experts, top_k=self._experts.top_k,
                experts=self._config.experts, prefill_chunk=chunk,
            )  # fmt: skip
        return plan_memory(
            ram_bytes=self._ram, runtime_bytes=self._runtime_bytes, resident_bytes=0, kv_bytes=0,
            workspace_bytes=host_workspace_bytes(self._model, chunk=chunk), slot_bytes=self._slot_bytes,
            num_experts=self._experts.num_experts, top_k=self._experts.top_k, experts=None, prefill_chunk=chunk,
            staging_bytes=STAGING_BYTES, load_bytes=self._load_bytes, device=self._divide_device(kv_bytes, chunk),
        )  # fmt: skip

    def _divide_device(self, kv_bytes: int, chunk: int) -> DevicePlan:
        return plan_device(
            vram_bytes=self._config.vram, free_bytes=self._free_bytes, context_bytes=self._context_bytes,
            resident_bytes=self._resident_bytes, kv_bytes=kv_bytes,
            workspace_bytes=workspace_bytes(
                self._model, chunk=chunk, context_length=self._context_length, on_device=True
            ),
            slack_bytes=self._slack_bytes, slot_bytes=device_slot_bytes(self._experts),
            num_experts=self._experts.num_experts, top_k=self._experts.top_k, experts=self._config.experts,
        )  # fmt: skip


def fit_to_free(plan: DevicePlan, device: Device, *, top_k: int) -> DevicePlan:
    """`plan` with fewer slots, and a warning, when others have taken device memory since it was made.

    Called right before the pool is allocated: the resident weights are there, what is `coming_bytes` is not. Raises
    BudgetError when fewer than `top_k` slots are left.
    """
    free_bytes = device.free_bytes()
    room = (free_bytes - plan.coming_bytes) // plan.slot_bytes
    if room >= plan.num_slots:
        return plan
    if room < top_k:
        need = plan.coming_bytes + top_k * plan.slot_bytes
        raise BudgetError(
            f"the device has {format_bytes(free_bytes)} left, {format_bytes(need)} are needed for KV cache, workspace "
            f"and {top_k} experts of {format_bytes(plan.slot_bytes)}; another program may have taken the rest: close "
            "it, or use --device cpu"
        )
    return shrink(plan, room)


def shrink(plan: DevicePlan, num_slots: int) -> DevicePlan:
    """`plan` with `num_slots` slots, fewer than planned, and a warning that says so."""
    warnings.warn(
        f"device memory was taken meanwhile: {num_slots} expert slots of {format_bytes(plan.slot_bytes)} instead of "
        f"{plan.num_slots}",
        stacklevel=2,
    )
    return dataclasses.replace(plan, num_slots=num_slots)


def baseline_room(baseline_bytes: int) -> int:
    """What `ram="auto"` allows the process to grow by: free memory, plus what the libraries have taken already."""
    return auto_ram(available_ram_bytes() + max(0, rss_bytes() - baseline_bytes))
