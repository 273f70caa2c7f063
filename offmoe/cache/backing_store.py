"""Backing stores, the sources of a slot's bytes: the files, for RAM slots; RAM slots, for device slots.

A source starts moves and says what a filled slot contains. It is called by the one thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from offmoe.checkpoint.expert_index import ExpertIndex, ReadPlan, plan_read
from offmoe.core.keys import ExpertKey
from offmoe.formats.dense import ExpertWeights, view_expert
from offmoe.tiers.copier import Ticket
from offmoe.tiers.disk import DiskTier
from offmoe.tiers.host import HostPool

LINE_BYTES = 64


class LayerBooks(Protocol):
    """A cache below another one."""

    def begin_layer(self, layer_idx: int) -> None:
        """A layer call begins."""


class BackingStore(Protocol):
    """The tier below a cache."""

    @property
    def host(self) -> LayerBooks | None:
        """The cache of that tier, if it has one."""

    def start(self, key: ExpertKey, slot: int, *, urgent: bool) -> Ticket | None:
        """Begin filling `slot` with `key`; None when the tier below has no room for it now."""

    def contents(self, key: ExpertKey, slot: int) -> ExpertWeights:
        """The weights in `slot`, after the ticket's wait. Raises CheckpointError when the bytes are no weights."""

    def num_bytes(self, key: ExpertKey) -> int:
        """Bytes that filling a slot with `key` moves."""

    def used(self, slots: Sequence[int]) -> None:
        """Work that reads `slots` has been submitted; no later move may write to them before it has ended."""

    def poll(self) -> None:
        """Drive what is under way on the tier below. Never blocks."""

    def settle(self) -> None:
        """Wait until nothing that was begun ahead of time on the tier below is under way."""

    def restart(self) -> None:
        """End every move, also those whose ticket was lost; afterwards nobody writes to a slot."""


class DiskStore:
    """Reads experts from the files into the slots of a host pool."""

    host = None

    def __init__(self, index: ExpertIndex, pool: HostPool, disk: DiskTier) -> None:
        self._index, self._pool, self._disk = index, pool, disk
        self._plans: dict[ExpertKey, ReadPlan] = {}
        self._offsets: list[tuple[int, ...]] = [()] * pool.num_slots
        self._keeps_all = pool.num_slots >= index.num_experts

    def start(self, key: ExpertKey, slot: int, *, urgent: bool) -> Ticket:
        """Queue the reads of `key`."""
        return self._disk.read(self._plan(key), self._pool.memory(slot), urgent=urgent)

    def contents(self, key: ExpertKey, slot: int) -> ExpertWeights:
        """Views of the pool's memory. Called once after each arrival: it may move the bytes."""
        self._offsets[slot] = self._arrange(key, slot)
        return view_expert(self._index.layers[key.layer_idx], self._pool.tensor(slot), self._offsets[slot])

    def num_bytes(self, key: ExpertKey) -> int:
        """Bytes read, what alignment adds included."""
        return sum(run.num_bytes for run in self._plan(key).runs)

    def sources(self, key: ExpertKey, slot: int) -> list[torch.Tensor]:
        """The expert's sources in a filled slot, in index order, as uint8 views."""
        memory, spans = self._pool.tensor(slot), self._index.spans(key)
        offsets = self._offsets[slot]
        return [memory.narrow(0, begin, span.num_bytes) for begin, span in zip(offsets, spans, strict=True)]

    def used(self, slots: Sequence[int]) -> None:
        """Computations on RAM slots have ended when they are released."""

    def poll(self) -> None:
        """Reads need no help."""

    def settle(self) -> None:
        """There is no cache below."""

    def restart(self) -> None:
        """End every read."""
        self._disk.restart()

    def _plan(self, key: ExpertKey) -> ReadPlan:
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_read(self._index.spans(key), align_bytes=self._disk.align_bytes)
        return plan

    def _arrange(self, key: ExpertKey, slot: int) -> tuple[int, ...]:
        """Offsets of the expert's sources in its slot, after moving it to a cache line's start where that pays.

        Files align tensors to 8 bytes, and torch's 16-bit products read weights 10-14% slower off a 64-byte line
        (8 bytes off: 10.1 against 11.5 GB/s up, 9.3 against 10.3 down). A move costs about a millisecond, so it is made
        only where all experts fit and each is moved once. Float32 stays: its last bits depend on the address.
        Quantised ones are read word by word, as kernels and torch like them.
        """
        plan, layer = self._plan(key), self._index.layers[key.layer_idx]
        if not self._keeps_all or not (layer.is_quantised or next(layer.stored_parts).dtype in ("BF16", "F16")):
            return plan.source_offsets
        offsets = list(plan.source_offsets)
        for run in plan.runs:
            end = run.slot_offset + run.need_bytes
            inside = [idx for idx, offset in enumerate(offsets) if run.slot_offset <= offset < end]
            first = min(offsets[idx] for idx in inside)
            shift = first % LINE_BYTES
            if shift:
                self._pool.move(slot, src=first, dst=first - shift, num_bytes=end - first)
                for idx in inside:
                    offsets[idx] -= shift
        return tuple(offsets)
