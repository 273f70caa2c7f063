"""Sizes of a model whose bfloat16 weights are packed in RAM, from its headers: as the loader packs them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from offmoe.checkpoint.derived import StoredTensor
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.formats.layout import aligned
from offmoe.formats.packed_sizes import LEAST_NUMBERS, WORTH_IT, loading_bytes, packed_slot, place_matrices
from offmoe.memory.shape import LATENT_MATRIX
from offmoe.planner.inspect import EMBEDDING, layer_of
from offmoe.tiers.pieces import ALL_THROUGH_BYTES

_BF16_BYTES = 2
Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class PackedSizes:
    """Bytes of a packed slot, of what packing needs beside the slots, and what it saves of the resident weights.

    `load_bytes`: the most while weights are read; `dense_saving`: of those that every token reads; `is_worth_it`: a
    slot is clearly smaller than a plain one.
    """

    slot_bytes: int
    staging_bytes: int
    resident_saving: int
    dense_saving: int
    load_bytes: int
    is_worth_it: bool


def find_packed(
    per_expert: Sequence[tuple[str, int, StoredTensor]], stacked: Sequence[tuple[StoredTensor, int]],
    resident: Sequence[StoredTensor], *, total: int, tied: bool, is_transposed: bool, num_experts: int,
) -> PackedSizes | None:  # fmt: skip
    """None where experts are not plain bfloat16, outputs by inputs. `total`: bytes of resident weights in memory;
    `tied`: the head, which every token reads, is the embedding.
    """
    experts: dict[tuple[str, int], list[Shape]] = {}
    for prefix, number, entry in per_expert:
        if not _is_bf16(entry, 2):
            return None
        experts.setdefault((prefix, number), []).append((entry.shape[0], entry.shape[1]))
    for entry, _ in stacked:
        if not _is_bf16(entry, 3) or is_transposed:
            return None
        experts.setdefault((layer_of(entry.name), 0), []).append((entry.shape[1], entry.shape[2]))
    slots, plain = [], []
    for shapes in experts.values():
        plain.append(sum(aligned(_BF16_BYTES * rows * columns) for rows, columns in shapes))
        slots.append(packed_slot(shapes, plain[-1]))
    largest = max(rows * columns for shapes in experts.values() for rows, columns in shapes)
    saving = dict(_savings(resident, num_experts))
    max_bytes = max((entry.num_bytes for entry in resident if entry.name in saving), default=0)
    return PackedSizes(
        slot_bytes=max(slots), staging_bytes=ALL_THROUGH_BYTES + _BF16_BYTES * largest,
        resident_saving=sum(saving.values()),
        dense_saving=sum(saved for name, saved in saving.items() if tied or not EMBEDDING.search(name)),
        load_bytes=loading_bytes(total - sum(saving.values()), total, max_bytes),
        is_worth_it=max(slots) <= WORTH_IT * max(plain),
    )  # fmt: skip


def _savings(resident: Sequence[StoredTensor], num_experts: int) -> Iterator[tuple[str, int]]:
    """Names of the matrices that are packed, and bytes that it saves."""
    for entry in resident:
        if not _is_bf16(entry, 2) or math.prod(entry.shape) < LEAST_NUMBERS or entry.shape[0] == num_experts:
            continue
        if LATENT_MATRIX not in entry.name:
            shape = entry.shape[0], entry.shape[1]
            yield entry.name, entry.num_bytes - place_matrices([shape])[1]


def _is_bf16(entry: StoredTensor, num_dims: int) -> bool:
    return isinstance(entry, TensorEntry) and entry.dtype == "BF16" and len(entry.shape) == num_dims
