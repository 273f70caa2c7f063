"""A machine's memory divided for a model: the same arithmetic for `offmoe plan` and for the loader.

The planner calls it with what headers and an earlier measurement of the machine say, the loader with what it has
measured; what differs between their plans is what goes in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from offmoe.core.config import EngineConfig
from offmoe.memory.budget import (
    CUDA_CONTEXT_BYTES,
    CUDA_SLACK_BYTES,
    SLACK_BYTES,
    STAGING_BYTES,
    DevicePlan,
    MemoryPlan,
    allowed_vram,
    plan_device,
    plan_memory,
)
from offmoe.memory.shape import ModelShape
from offmoe.memory.workspace import choose_chunk, host_workspace_bytes, workspace_bytes

# Of what the fixed parts leave beside the fewest slots, one part in so many may be for kept prompts.
_KEPT_SHARE = 16


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Bytes of a model's parts. `slot_bytes` of a slot in RAM, `device_slot_bytes` of one on a device; `load_bytes`
    pass through RAM at once on their way to a device, `staging_bytes` on the way to packed slots.
    """

    shape: ModelShape
    resident_bytes: int
    load_bytes: int
    slot_bytes: int
    device_slot_bytes: int
    num_experts: int
    top_k: int
    staging_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Memory that may be used: `ram_bytes` that the process may grow by, `runtime_bytes` of them taken by libraries.

    `vram_free_bytes` of a device, beside its driver's context; None where the model runs in RAM. `is_cuda`: the driver
    takes its part, `driver_bytes` where that was measured.
    """

    ram_bytes: int
    runtime_bytes: int
    vram_free_bytes: int | None = None
    is_cuda: bool = False
    driver_bytes: int | None = None

    @property
    def context_bytes(self) -> int:
        """Bytes that the driver takes."""
        if self.driver_bytes is not None:
            return self.driver_bytes
        return CUDA_CONTEXT_BYTES if self.is_cuda else 0

    @property
    def slack_bytes(self) -> int:
        """Bytes that are kept free on the device."""
        return CUDA_SLACK_BYTES if self.is_cuda else 0


@dataclass(frozen=True, kw_only=True)
class MemoryPlanner:
    """`sizes` on `machine` as `config` allows, for `context_length` tokens of `kv_bytes`.

    `chunkable`: a prompt may go through the model in pieces.
    """

    sizes: ModelSizes
    machine: Machine
    config: EngineConfig
    context_length: int
    kv_bytes: int
    chunkable: bool = True

    def plan(self) -> MemoryPlan:
        """Plan of memory. Raises BudgetError with the smallest budget that works."""
        return self.plan_with(self.choose_chunk())

    def plan_most_modest(self) -> MemoryPlan:
        """The plan of the smallest prefill chunk: what it refuses cannot run."""
        chunk = self.config.prefill_chunk or self._chunk_for(0)
        return self.plan_with(min(self.context_length, chunk))

    def choose_chunk(self) -> int:
        """Prompt tokens that go through the model at once."""
        if not self.chunkable:
            return self.context_length
        return min(self.context_length, self.config.prefill_chunk or self._chunk_for(self._room_bytes()))

    def plan_with(self, chunk: int) -> MemoryPlan:
        """The plan with a given prefill chunk. Raises BudgetError."""
        sizes, machine = self.sizes, self.machine
        device = self._plan_device(chunk)
        in_ram = device is None
        workspace = (
            self._workspace(chunk, on_device=False) if in_ram else host_workspace_bytes(sizes.shape, chunk=chunk)
        )
        bare = partial(
            plan_memory,
            ram_bytes=machine.ram_bytes, runtime_bytes=machine.runtime_bytes,
            resident_bytes=sizes.resident_bytes if in_ram else 0, kv_bytes=self.kv_bytes if in_ram else 0,
            workspace_bytes=workspace, slot_bytes=sizes.slot_bytes, num_experts=sizes.num_experts, top_k=sizes.top_k,
            expert_slots=self.config.expert_slots if in_ram else None, prefill_chunk=chunk,
            staging_bytes=sizes.staging_bytes if in_ram else STAGING_BYTES,
            load_bytes=0 if in_ram and not sizes.staging_bytes else sizes.load_bytes, device=device,
        )  # fmt: skip
        if self.config.kept_prompts is not None:
            return bare(kept_bytes=self.config.kept_prompts if self.chunkable else 0)
        plan = bare()
        return bare(kept_bytes=self._kept_bytes(plan)) if self.chunkable else plan

    def _kept_bytes(self, plan: MemoryPlan) -> int:
        """Bytes for kept prompts: two contexts, where that is little of what the fixed parts leave.

        The fewest expert slots, and those that the user asked for, come first.
        """
        slots = min(self.config.expert_slots or self.sizes.top_k, plan.num_experts) if plan.device is None else 0
        slots = max(slots, self.sizes.top_k)
        left = plan.ram_bytes - plan.fixed_bytes - slots * plan.slot_bytes
        return max(0, min(2 * self.kv_bytes, left // _KEPT_SHARE))

    def with_runtime(self, runtime_bytes: int) -> MemoryPlanner:
        """The same where libraries take `runtime_bytes`."""
        return replace(self, machine=replace(self.machine, runtime_bytes=runtime_bytes))

    def _plan_device(self, chunk: int) -> DevicePlan | None:
        sizes, machine = self.sizes, self.machine
        if machine.vram_free_bytes is None:
            return None
        return plan_device(
            vram_bytes=self.config.vram, free_bytes=machine.vram_free_bytes, context_bytes=machine.context_bytes,
            resident_bytes=sizes.resident_bytes, kv_bytes=self.kv_bytes,
            workspace_bytes=self._workspace(chunk, on_device=True), slack_bytes=machine.slack_bytes,
            slot_bytes=sizes.device_slot_bytes, num_experts=sizes.num_experts, top_k=sizes.top_k,
            expert_slots=self.config.expert_slots,
        )  # fmt: skip

    def _workspace(self, chunk: int, *, on_device: bool) -> int:
        return workspace_bytes(self.sizes.shape, chunk=chunk, context_length=self.context_length, on_device=on_device)

    def _chunk_for(self, room_bytes: int) -> int:
        return choose_chunk(
            self.sizes.shape, context_length=self.context_length, room_bytes=room_bytes,
            on_device=self.machine.vram_free_bytes is not None,
        )  # fmt: skip

    def _room_bytes(self) -> int:
        """Bytes left, where the model computes, for a prefill chunk's workspace and more slots than the fewest."""
        sizes, machine = self.sizes, self.machine
        slots = min(self.config.expert_slots or sizes.top_k, sizes.num_experts)
        taken = sizes.resident_bytes + self.kv_bytes
        if machine.vram_free_bytes is None:
            taken += SLACK_BYTES + sizes.staging_bytes
            return machine.ram_bytes - machine.runtime_bytes - taken - slots * sizes.slot_bytes
        allowed = allowed_vram(self.config.vram, machine.vram_free_bytes + machine.context_bytes)
        taken += machine.context_bytes + machine.slack_bytes
        return allowed - taken - slots * sizes.device_slot_bytes
