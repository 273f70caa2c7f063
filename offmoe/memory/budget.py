"""Memory, counted before it is taken: what fixed parts need, and how many expert slots are left, here and on a device.

Without a device, RAM holds everything. With one, the model and its caches lie there, and RAM holds the libraries, the
expert slots that feed the device, and for a moment the weights that are on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offmoe.core.errors import BudgetError
from offmoe.core.units import format_bytes

# Left to the system when `ram` is "auto": a tenth of what is free, and at least this much or a third.
MIN_RESERVE_BYTES = 1 << 30
# The allocator's rounding and what Python itself grows by while generating (measured: 20-60 MiB).
SLACK_BYTES = 96 << 20
# Of that, what a run was seen to take (the rest is for those that were not seen): predictions count this much.
EXPECTED_GROWTH_BYTES = 36 << 20
# Left to the desktop and other programs when `vram` is "auto": a sixteenth of what is free, and at least this much.
MIN_VRAM_RESERVE_BYTES = 512 << 20
# What the driver takes for a process that uses a GPU, before it allocates: its context and torch's kernels.
# It is in no allocator's count, but in the device's, so a budget of the whole process has it. Plans made without the
# device count this much; at load it is measured, where the management library tells (tiers/driver_memory.py).
CUDA_CONTEXT_BYTES = 512 << 20
# Work spaces of cuBLAS (32 MiB a stream on the largest devices), kernels that are loaded at their first use, and the
# allocator's rounding to 2 and 20 MiB blocks. tests/gpu measures it.
CUDA_SLACK_BYTES = 192 << 20

# Pinned memory that copies to a device pass through.
STAGING_BYTES = 32 << 20

_Parts = Sequence[tuple[str, int]]


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """Division of a device's `vram_bytes`. `context_bytes` is what its driver takes, `slack_bytes` is kept free."""

    vram_bytes: int
    context_bytes: int
    resident_bytes: int
    kv_bytes: int
    workspace_bytes: int
    slack_bytes: int
    slot_bytes: int
    num_slots: int
    num_experts: int

    @property
    def pool_bytes(self) -> int:
        """Bytes of the device pool."""
        return self.num_slots * self.slot_bytes

    @property
    def fixed_bytes(self) -> int:
        """Everything but the pool."""
        return self.context_bytes + self.resident_bytes + self.coming_bytes

    @property
    def coming_bytes(self) -> int:
        """Bytes that are not taken yet when the pool is made, and must be left free."""
        return self.kv_bytes + self.workspace_bytes + self.slack_bytes

    @property
    def total_bytes(self) -> int:
        """The peak that is expected."""
        return self.fixed_bytes + self.pool_bytes

    def line(self) -> str:
        """Half a line for people."""
        return (
            f"{self.num_slots} of {self.num_experts} experts on the device ({format_bytes(self.pool_bytes)}), "
            f"resident {format_bytes(self.resident_bytes)}, KV {format_bytes(self.kv_bytes)}, "
            f"workspace {format_bytes(self.workspace_bytes)}; vram {format_bytes(self.vram_bytes)}"
        )


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Division of `ram_bytes`. `runtime` is what libraries and the model's skeleton took before any weight was read,
    `kept` what prompts that were read may take.

    With a `device`, resident weights and KV cache are not in RAM, but `staging_bytes` for copies and, while the model
    is loaded, `load_bytes` are.
    """

    ram_bytes: int
    runtime_bytes: int
    resident_bytes: int
    kv_bytes: int
    workspace_bytes: int
    slot_bytes: int
    num_slots: int
    num_experts: int
    prefill_chunk: int
    staging_bytes: int = 0
    load_bytes: int = 0
    kept_bytes: int = 0
    device: DevicePlan | None = None

    @property
    def pool_bytes(self) -> int:
        """Bytes of the host pool."""
        return self.num_slots * self.slot_bytes

    @property
    def computing_slots(self) -> int:
        """Expert slots of the tier that computes: the device's where there is one."""
        return self.num_slots if self.device is None else self.device.num_slots

    @property
    def fixed_bytes(self) -> int:
        """Everything but the pool."""
        parts = self.runtime_bytes + self.resident_bytes + self.kv_bytes + self.workspace_bytes + self.staging_bytes
        return parts + self.kept_bytes + SLACK_BYTES

    @property
    def total_bytes(self) -> int:
        """The peak that is expected: while running, or while loading for a device."""
        return max(self.fixed_bytes + self.pool_bytes, self.runtime_bytes + self.load_bytes + SLACK_BYTES)

    @property
    def expected_bytes(self) -> int:
        """The peak as it was seen to be, with a prompt that fills a prefill chunk: without most of the slack."""
        return self.total_bytes - SLACK_BYTES + EXPECTED_GROWTH_BYTES

    def line(self) -> str:
        """One line for people."""
        kept = f", kept prompts {format_bytes(self.kept_bytes)}" if self.kept_bytes else ""
        experts = f"{self.num_slots} of {self.num_experts} experts in RAM ({format_bytes(self.pool_bytes)})"
        libraries, budget = f"libraries {format_bytes(self.runtime_bytes)}", format_bytes(self.ram_bytes)
        if self.device is not None:
            return f"{self.device.line()}; {experts}, {libraries}{kept}; ram {budget}"
        return (
            f"{experts}, resident {format_bytes(self.resident_bytes)}, KV {format_bytes(self.kv_bytes)}, "
            f"workspace {format_bytes(self.workspace_bytes)}, {libraries}{kept}; budget {budget}"
        )


def ram_reserve(available_bytes: int) -> int:
    """Bytes of the memory that is free which "auto" leaves to the system: a container of 1 GiB can be used, too."""
    return max(min(MIN_RESERVE_BYTES, -(-available_bytes // 3)), available_bytes // 10)


def auto_ram(available_bytes: int) -> int:
    """Bytes that "auto" may use of the memory that is free: never all of it."""
    return available_bytes - ram_reserve(available_bytes)


def auto_vram(available_bytes: int) -> int:
    """Bytes that "auto" may use of the device memory that is free: never all of it."""
    return max(0, available_bytes - max(MIN_VRAM_RESERVE_BYTES, available_bytes // 16))


def allowed_vram(vram_bytes: int | None, most_bytes: int) -> int:
    """Bytes that may be used of the `most_bytes` that can be had, where the user allows `vram_bytes` (None: "auto")."""
    return auto_vram(most_bytes) if vram_bytes is None else min(vram_bytes, most_bytes)


def plan_memory(
    *, ram_bytes: int, runtime_bytes: int, resident_bytes: int, kv_bytes: int, workspace_bytes: int, slot_bytes: int,
    num_experts: int, top_k: int, expert_slots: int | None, prefill_chunk: int, staging_bytes: int = 0,
    load_bytes: int = 0, kept_bytes: int = 0, device: DevicePlan | None = None,
) -> MemoryPlan:  # fmt: skip
    """Slots for what the fixed parts leave of `ram_bytes`, or exactly `expert_slots` when the user asked for them.

    Raises BudgetError, with the smallest budget that works, when fewer than `top_k` slots (one layer's experts for one
    token) fit.
    """
    parts = [
        ("libraries", runtime_bytes), ("resident weights", resident_bytes), ("KV cache", kv_bytes),
        ("workspace", workspace_bytes + SLACK_BYTES), ("staging", staging_bytes), ("kept prompts", kept_bytes),
    ]  # fmt: skip
    loading = runtime_bytes + load_bytes + SLACK_BYTES
    if loading > ram_bytes and loading > _total(parts) + top_k * slot_bytes:
        need = suggested_mib(loading)
        raise BudgetError(
            f"ram is {format_bytes(ram_bytes)}, loading this model needs {need} MiB: libraries "
            f"{format_bytes(runtime_bytes)}, and {format_bytes(load_bytes)} of weights on their way; "
            f"use --ram {need}MiB"
        )
    num_slots = _count_slots(
        "ram", ram_bytes, parts, slot_bytes=slot_bytes, num_experts=num_experts, top_k=top_k,
        expert_slots=expert_slots, most_bytes=None, otherwise=" or a lower --context-length" if device is None else "",
    )  # fmt: skip
    return MemoryPlan(
        ram_bytes=ram_bytes, runtime_bytes=runtime_bytes, resident_bytes=resident_bytes, kv_bytes=kv_bytes,
        workspace_bytes=workspace_bytes, slot_bytes=slot_bytes, num_slots=num_slots, num_experts=num_experts,
        prefill_chunk=prefill_chunk, staging_bytes=staging_bytes, load_bytes=load_bytes, kept_bytes=kept_bytes,
        device=device,
    )  # fmt: skip


def plan_device(
    *, vram_bytes: int | None, free_bytes: int, context_bytes: int, resident_bytes: int, kv_bytes: int,
    workspace_bytes: int, slack_bytes: int, slot_bytes: int, num_experts: int, top_k: int, expert_slots: int | None,
) -> DevicePlan:  # fmt: skip
    """Plan the memory of a device with `free_bytes` free beside the context that the driver has taken already.

    `vram_bytes` is what the user allows, the context included; None: most of what is free. What is not free is not
    planned with, whatever the user allows. Raises BudgetError.
    """
    most_bytes = free_bytes + context_bytes
    allowed = allowed_vram(vram_bytes, most_bytes)
    parts = [
        ("driver", context_bytes), ("resident weights", resident_bytes), ("KV cache", kv_bytes),
        ("workspace", workspace_bytes + slack_bytes),
    ]  # fmt: skip
    num_slots = _count_slots(
        "vram", allowed, parts, slot_bytes=slot_bytes, num_experts=num_experts, top_k=top_k,
        expert_slots=expert_slots, most_bytes=most_bytes, otherwise=", a lower --context-length or --device cpu",
    )  # fmt: skip
    return DevicePlan(
        vram_bytes=allowed, context_bytes=context_bytes, resident_bytes=resident_bytes, kv_bytes=kv_bytes,
        workspace_bytes=workspace_bytes, slack_bytes=slack_bytes, slot_bytes=slot_bytes, num_slots=num_slots,
        num_experts=num_experts,
    )  # fmt: skip


def _count_slots(
    name: str, budget_bytes: int, parts: _Parts, *, slot_bytes: int, num_experts: int, top_k: int,
    expert_slots: int | None, most_bytes: int | None, otherwise: str,
) -> int:  # fmt: skip
    """Slots beside `parts`. A refusal advises a budget of at most `most_bytes`, and `otherwise`."""
    if expert_slots is not None and expert_slots < top_k:
        raise BudgetError(
            f"expert_slots is {expert_slots}, one token needs {top_k} in a layer; use --expert-slots {top_k} or more"
        )
    fixed = _total(parts)
    room = (budget_bytes - fixed) // slot_bytes
    listed = ", ".join(f"{part} {format_bytes(size)}" for part, size in parts if size)
    if room < top_k:
        smallest = suggested_mib(fixed + top_k * slot_bytes)
        advice = _advice(name, smallest, most_bytes, otherwise)
        raise BudgetError(
            f"{name} is {format_bytes(budget_bytes)}, this model needs {smallest} MiB: {listed}, and {top_k} experts "
            f"of {format_bytes(slot_bytes)}; {advice}"
        )
    if expert_slots is not None and min(expert_slots, num_experts) > room:
        need = suggested_mib(fixed + min(expert_slots, num_experts) * slot_bytes)
        fits = most_bytes is None or need << 20 <= most_bytes
        raise BudgetError(
            f"--expert-slots {expert_slots} needs {need} MiB ({listed}), {name} is {format_bytes(budget_bytes)} with "
            f"room for {room}; use --expert-slots {room}" + (f" or --{name} {need}MiB" if fits else "")
        )
    return min(num_experts if expert_slots is None else expert_slots, num_experts, room)


def _advice(name: str, need_mib: int, most_bytes: int | None, otherwise: str) -> str:
    if most_bytes is None or need_mib << 20 <= most_bytes:
        return f"use --{name} {need_mib}MiB{otherwise}"
    return f"{format_bytes(most_bytes)} can be had; use{otherwise.removeprefix(',')}"


def _total(parts: _Parts) -> int:
    return sum(size for _, size in parts)


def suggested_mib(num_bytes: int) -> int:
    """MiB to advise for `num_bytes`: 8 to 24 MiB more, since what libraries take differs by a few from run to run."""
    return -(-(num_bytes + (8 << 20)) // (16 << 20)) * 16
