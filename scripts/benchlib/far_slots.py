"""Slots in RAM that a device's kernels address as if they lay in its slab.

A GPU of one address space reads page-locked RAM over the link by itself. The kernels find a slot at `slab + slot *
slot_bytes`, and a slot number may be any: where RAM slots lie a whole number of slots from the slab, they have numbers
too. So a table of slots is a table of pointers, and no kernel changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class FarSlots:
    """`base`: the tensor that kernels are given as their slab, the lower of the two; the numbers that the first slot
    on the device and the first in RAM have from there.
    """

    base: torch.Tensor
    first_near: int
    first_far: int


def make_far_slab(near: torch.Tensor, num_slots: int, slot_bytes: int) -> torch.Tensor:
    """Slots in RAM (uint8, page-locked beside a GPU), a whole number of slots away from `near`."""
    memory = torch.empty((num_slots + 1) * slot_bytes, dtype=torch.uint8, pin_memory=near.is_cuda)
    skipped = (near.data_ptr() - memory.data_ptr()) % slot_bytes
    return memory[skipped : skipped + num_slots * slot_bytes]


def number_slots(near: torch.Tensor, far: torch.Tensor, slot_bytes: int) -> FarSlots:
    """Slot numbers of both from the lower one; negative numbers mean "missing" to the kernels."""
    distance, rest = divmod(far.data_ptr() - near.data_ptr(), slot_bytes)
    assert not rest, f"{rest=} {slot_bytes=}"
    if distance >= 0:
        return FarSlots(base=near, first_near=0, first_far=distance)
    return FarSlots(base=far, first_near=-distance, first_far=0)
