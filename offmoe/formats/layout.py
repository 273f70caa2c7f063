"""Layout of a device slot, where each source of an expert lies: the same for all experts of a layer. No torch.

A host slot keeps the bytes as the read brought them, so its offsets differ from expert to expert. A device slot is
filled source by source, to fixed places: kernels then take a layer's offsets as constants.
"""

from __future__ import annotations

from dataclasses import dataclass

from offmoe.checkpoint.expert_index import ExpertIndex, MoeLayer

# What CUDA aligns its own allocations to, and a multiple of every vector load and of every type's size.
SLOT_ALIGN_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """Source i of the layer begins `offsets[i]` bytes into a slot; `slot_bytes` hold them all. All multiples of 256."""

    offsets: tuple[int, ...]
    slot_bytes: int


def layout_of(layer: MoeLayer) -> LayerLayout:
    """The layer's sources one after the other, in the order in which the matrices use them.

    Gate and up therefore lie side by side where their sizes are multiples of 256, and are viewed as one matrix.
    """
    used = dict.fromkeys(part.source_idx for part in layer.stored_parts)
    order = [*used, *(idx for idx in range(len(layer.spans[0])) if idx not in used)]
    offsets = [0] * len(order)
    end = 0
    for idx in order:
        offsets[idx] = end
        end += aligned(max(spans[idx].num_bytes for spans in layer.spans))
    return LayerLayout(offsets=tuple(offsets), slot_bytes=end)


def device_slot_bytes(index: ExpertIndex) -> int:
    """Bytes of a slot that an expert of any layer fits into."""
    return max(layout_of(layer).slot_bytes for layer in index.layers)


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to a multiple of SLOT_ALIGN_BYTES."""
    return num_bytes + -num_bytes % SLOT_ALIGN_BYTES
