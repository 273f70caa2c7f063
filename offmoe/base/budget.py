"""Memory, counted before it is taken: what fixed parts need, and how many expert slots are left."""

from __future__ import annotations

from dataclasses import dataclass

from offmoe.base.errors import BudgetError
from offmoe.base.units import format_bytes

# Left to the system when `ram` is "auto": a tenth of what is free, and at least this much.
MIN_RESERVE_BYTES = 1 << 30
# The allocator's rounding and what Python itself grows by while generating (measured: 20-60 MiB).
SLACK_BYTES = 96 << 20


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Where `ram_bytes` go. `runtime` is what libraries and the model's skeleton took before any weight was read."""

    ram_bytes: int
    runtime_bytes: int
    resident_bytes: int
    kv_bytes: int
    workspace_bytes: int
    slot_bytes: int
    num_slots: int
    num_experts: int
    prefill_chunk: int

    @property
    def pool_bytes(self) -> int:
        """Bytes of the host pool."""
        return self.num_slots * self.slot_bytes

    @property
    def fixed_bytes(self) -> int:
        """Everything but the pool."""
        return self.runtime_bytes + self.resident_bytes + self.kv_bytes + self.workspace_bytes + SLACK_BYTES

    @property
    def total_bytes(self) -> int:
        """The peak that is expected."""
        return self.fixed_bytes + self.pool_bytes

    def line(self) -> str:
        """One line for people."""
        return (
            f"{self.num_slots} of {self.num_experts} experts in RAM ({format_bytes(self.pool_bytes)}), "
            f"resident {format_bytes(self.resident_bytes)}, KV {format_bytes(self.kv_bytes)}, "
            f"workspace {format_bytes(self.workspace_bytes)}, libraries {format_bytes(self.runtime_bytes)}; "
            f"budget {format_bytes(self.ram_bytes)}"
        )


def auto_ram(available_bytes: int) -> int:
    """What "auto" may use of the memory that is free: never all of it."""
    return max(0, available_bytes - max(MIN_RESERVE_BYTES, available_bytes // 10))


def plan_memory(
    *, ram_bytes: int, runtime_bytes: int, resident_bytes: int, kv_bytes: int, workspace_bytes: int, slot_bytes: int,
    num_experts: int, top_k: int, experts: int | None, prefill_chunk: int,
) -> MemoryPlan:  # fmt: skip
    """Slots for what the fixed parts leave of `ram_bytes`, or exactly `experts` slots when the user asked for them.

    Raises BudgetError, with the smallest budget that works, when fewer than `top_k` slots (one layer's experts for one
    token) fit.
    """
    if experts is not None and experts < top_k:
        raise BudgetError(f"experts is {experts}, one token needs {top_k} in a layer; use --experts {top_k} or more")
    fixed = runtime_bytes + resident_bytes + kv_bytes + workspace_bytes + SLACK_BYTES
    smallest = suggested_mib(fixed + top_k * slot_bytes)
    room = (ram_bytes - fixed) // slot_bytes
    parts = (
        f"libraries {format_bytes(runtime_bytes)}, resident weights {format_bytes(resident_bytes)}, "
        f"KV cache {format_bytes(kv_bytes)}, workspace {format_bytes(workspace_bytes + SLACK_BYTES)}"
    )
    if room < top_k:
        raise BudgetError(
            f"ram is {format_bytes(ram_bytes)}, this model needs {smallest} MiB: {parts}, and {top_k} experts of "
            f"{format_bytes(slot_bytes)}; use --ram {smallest}MiB or a lower --context-length"
        )
    wanted = num_experts if experts is None else experts
    if experts is not None and min(experts, num_experts) > room:
        need = suggested_mib(fixed + min(experts, num_experts) * slot_bytes)
        raise BudgetError(
            f"--experts {experts} needs {need} MiB ({parts}), ram is {format_bytes(ram_bytes)} with room for {room}; "
            f"use --experts {room} or --ram {need}MiB"
        )
    return MemoryPlan(
        ram_bytes=ram_bytes, runtime_bytes=runtime_bytes, resident_bytes=resident_bytes, kv_bytes=kv_bytes,
        workspace_bytes=workspace_bytes, slot_bytes=slot_bytes, num_slots=min(wanted, num_experts, room),
        num_experts=num_experts, prefill_chunk=prefill_chunk,
    )  # fmt: skip


def suggested_mib(num_bytes: int) -> int:
    """MiB to advise for `num_bytes`: 8 to 24 MiB more, since what libraries take differs by a few from run to run."""
    return -(-(num_bytes + (8 << 20)) // (16 << 20)) * 16
