"""Reads bfloat16 experts from the files and packs them, on the threads that read, into slots of 12 bits a weight.

Rows of a matrix are packed one by one (formats/packed.py), so a piece of a file is read, packed and forgotten while it
is in a core's cache. An expert with more escapes than its slot has room for lies as it is stored in its slot and the
next one together, a wide slot; where that one is in use, in memory of its own until it goes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from offmoe.checkpoint.expert_index import ExpertIndex, ExpertPart, MoeLayer, Span
from offmoe.core.errors import UnsupportedModelError
from offmoe.core.keys import ExpertKey
from offmoe.formats.dense import ExpertWeights, view_expert
from offmoe.formats.layout import LayerLayout, layout_of
from offmoe.formats.packed_sizes import MOST_COLUMNS, PackedPlace, packed_slot, place_matrices
from offmoe.formats.packed_slot import num_escapes, view_packed
from offmoe.formats.quantised import QuantMatrix
from offmoe.tiers.copier import Ticket
from offmoe.tiers.disk import DiskTier, Passage
from offmoe.tiers.host import HostPool
from offmoe.tiers.pieces import ALL_THROUGH_BYTES, PIECE_BYTES

BF16_BYTES = 2


class Packer(Protocol):
    """The kernels that pack and unpack."""

    def pack(self, values: int, begin: int, end: int, place: PackedPlace, slot: int) -> None:
        """Rows [begin, end), side by side from address `values` on, to their place in the slot at address `slot`."""

    def unpack(self, matrix: QuantMatrix, rows: slice) -> torch.Tensor:
        """Rows of a packed matrix as bfloat16."""


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """The packed matrices of one layer's experts: a place for each part of `up`, then of `down`."""

    parts: tuple[ExpertPart, ...]
    places: tuple[PackedPlace, ...]
    num_up: int
    slot_bytes: int


def why_not_packed(index: ExpertIndex) -> str | None:
    """Why experts of this model cannot be packed; None where they can."""
    for layer in index.layers:
        if layer.is_quantised:
            return "they are quantised already"
        parts = list(layer.stored_parts)
        if any(part.dtype != "BF16" for part in parts):
            return f"they are {parts[0].dtype}, which has no such redundancy; bfloat16 has"
        if layer.transposed:
            return "they are stored inputs by outputs"
        if any(part.strides != (part.shape[1], 1) for part in parts):
            return "rows of their matrices take turns"
        if any(part.shape[1] >= MOST_COLUMNS or part.shape[1] * BF16_BYTES > PIECE_BYTES for part in parts):
            return f"a row of theirs is longer than {PIECE_BYTES} bytes"
    return None


def packed_layout(layer: MoeLayer) -> PackedLayout:
    """Places of a layer's parts, for which `why_not_packed` gives None."""
    parts = tuple(part for part in (*layer.up, *layer.down) if isinstance(part, ExpertPart))
    if len(parts) != len(layer.up) + len(layer.down):
        raise UnsupportedModelError(f"{layer.name} has quantised experts, which are not packed")
    places, num_bytes = place_matrices(part.shape for part in parts)
    return PackedLayout(parts, places, len(layer.up), num_bytes)


def packed_slot_bytes(index: ExpertIndex) -> int:
    """Bytes of a slot that a packed expert of any layer fits into, and two of which hold one as it is stored."""
    return max(
        packed_slot([part.shape for part in packed_layout(layer).parts], layout_of(layer).slot_bytes)
        for layer in index.layers
    )


def packing_bytes(index: ExpertIndex) -> int:
    """Memory that packing takes beside the slots: what passes through the threads, and a matrix that is unpacked."""
    largest = max(part.shape[0] * part.shape[1] for layer in index.layers for part in layer.stored_parts)
    return ALL_THROUGH_BYTES + BF16_BYTES * largest


class PackingStore:
    """Reads experts from the files into the slots of a host pool, packed.

    `take_next(slot)` makes the slot behind a slot free and keeps it from others, or says that it cannot; `give_back`
    returns it. Both are the cache's.
    """

    host = None

    def __init__(self, index: ExpertIndex, pool: HostPool, disk: DiskTier, packer: Packer) -> None:
        self._index, self._pool, self._disk, self._packer = index, pool, disk, packer
        self._layouts = [packed_layout(layer) for layer in index.layers]
        self._plain = [layout_of(layer) for layer in index.layers]
        self._slab = pool.slab.data_ptr()
        self.take_next: Callable[[int], bool] = lambda slot: False
        self.wide: set[ExpertKey] = set()

    def start(self, key: ExpertKey, slot: int, *, urgent: bool) -> Ticket:
        """Queue the reads of `key`."""
        layout = self._layouts[key.layer_idx]
        self._pool.tensor(slot)[: 4 * len(layout.places)].zero_()
        return self._disk.read_through(list(self._passages(key, slot)), urgent=urgent)

    def contents(self, key: ExpertKey, slot: int) -> ExpertWeights:
        """Views of the pool's memory. An expert that did not fit is read again, and raises what a read raises."""
        layout, memory = self._layouts[key.layer_idx], self._pool.tensor(slot)
        if any(num_escapes(place, memory) > place.most_escapes for place in layout.places):
            return self._wide(key, slot)
        matrices = [view_packed(place, memory, self._packer.unpack) for place in layout.places]
        return ExpertWeights(up=tuple(matrices[: layout.num_up]), down=tuple(matrices[layout.num_up :]))

    def num_bytes(self, key: ExpertKey) -> int:
        """Bytes of the expert in the files."""
        return self._index.layers[key.layer_idx].expert_bytes

    def used(self, slots: Sequence[int]) -> None:
        """Computations on RAM slots have ended when they are released."""

    def poll(self) -> None:
        """Reads need no help."""

    def settle(self) -> None:
        """There is no cache below."""

    def restart(self) -> None:
        """End every read."""
        self._disk.restart()

    def _passages(self, key: ExpertKey, slot: int) -> Iterator[Passage]:
        """Every part in pieces of whole rows."""
        layout, spans = self._layouts[key.layer_idx], self._index.spans(key)
        address = self._slab + slot * self._pool.slot_bytes
        for part, place in zip(layout.parts, layout.places, strict=True):
            rows, columns = part.shape
            step = PIECE_BYTES // (BF16_BYTES * columns)
            span = spans[part.source_idx]
            for begin in range(0, rows, step):
                end = min(begin + step, rows)
                start = span.start + BF16_BYTES * (part.offset + begin * columns)
                take = partial(self._packer.pack, begin=begin, end=end, place=place, slot=address)
                yield Passage(span.file_idx, start, BF16_BYTES * (end - begin) * columns, take)

    def _wide(self, key: ExpertKey, slot: int) -> ExpertWeights:
        """The expert as it is stored, read once more."""
        self.wide.add(key)
        layer, layout = self._index.layers[key.layer_idx], self._plain[key.layer_idx]
        if self.take_next(slot):
            begin = slot * self._pool.slot_bytes
            memory = self._pool.slab[begin : begin + 2 * self._pool.slot_bytes]
        else:
            memory = torch.empty(layout.slot_bytes, dtype=torch.uint8)
        pieces = _copies(self._index.spans(key), layout, memory.data_ptr())
        self._disk.read_through(list(pieces), urgent=True).wait()
        return view_expert(layer, memory, layout.offsets)


def _copies(spans: Sequence[Span], layout: LayerLayout, address: int) -> Iterator[Passage]:
    """Every source to its place behind `address`, as it is."""
    for span, offset in zip(spans, layout.offsets, strict=True):
        for begin in range(0, span.num_bytes, PIECE_BYTES):
            num_bytes = min(PIECE_BYTES, span.num_bytes - begin)
            take = partial(_copy, to=address + offset + begin, num_bytes=num_bytes)
            yield Passage(span.file_idx, span.start + begin, num_bytes, take)


def _copy(values: int, *, to: int, num_bytes: int) -> None:
    ctypes.memmove(to, values, num_bytes)
