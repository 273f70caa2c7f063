"""Whether bfloat16 experts are kept packed in RAM: what `pack` says, what they are, and what computes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offmoe.cache.packing_store import packed_slot_bytes, packing_bytes, why_not_packed
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.core.config import PackMode
from offmoe.formats.packed_sizes import WORTH_IT
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.packing import CpuPacker
from offmoe.machine.instruction_sets import PACKING_SETS


@dataclass(frozen=True, kw_only=True)
class PackedSlots:
    """Experts are packed: bytes of a slot, and memory beside the slots."""

    packer: CpuPacker
    slot_bytes: int
    staging_bytes: int


def choose_packing(
    pack: PackMode, index: ExpertIndex, dtype: torch.dtype, kernels: CpuKernels | None, *, slot_bytes: int,
    on_device: bool,
) -> tuple[PackedSlots | None, str | None]:  # fmt: skip
    """The packing of experts, None where there is none; and a line for who asked for it and does not get it.

    `slot_bytes` of a plain slot; `dtype` is what the model computes in.
    """
    reason = None if pack == "off" else _why_not(index, dtype, kernels, on_device=on_device)
    if pack == "off" or reason is not None or kernels is None:
        return None, f"pack is on, and experts are not packed: {reason}" if pack == "on" else None
    packing = PackedSlots(
        packer=CpuPacker(kernels), slot_bytes=packed_slot_bytes(index), staging_bytes=packing_bytes(index)
    )
    gains = kernels.level in PACKING_SETS and packing.slot_bytes <= WORTH_IT * slot_bytes
    return (packing if gains or pack == "on" else None), None


def _why_not(index: ExpertIndex, dtype: torch.dtype, kernels: CpuKernels | None, *, on_device: bool) -> str | None:
    if on_device:
        return "a device computes them, whose kernels read plain ones"
    if kernels is None:
        return "there are no CPU kernels, which pack them"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"the model computes in {str(dtype).removeprefix('torch.')}"
    return why_not_packed(index)
