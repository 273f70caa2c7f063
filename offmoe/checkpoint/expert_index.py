"""The expert index: where each routed expert's bytes lie, and how a slot of them is cut into matrices. No torch.

A layer's experts all have the same matrices. A matrix (`up`: gate and up projection, or up alone; `down`) is a list of
parts to be concatenated along the output dimension; a part is a strided 2-D view of one *source*, and a source is a
whole tensor (one tensor per expert) or one slice of a stacked 3-D tensor. So transposition, interleaving and merge
order cost nothing: they are in the strides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.checkpoint.shard_file import DIRECT_ALIGN_BYTES
from offmoe.core.keys import ExpertKey

# Where the page cache is used, a source still lies in memory as it lies in the file modulo 64 bytes, as it does when
# read directly: MKL's float32 matrix-vector product gives other last bits at other addresses modulo 16.
BUFFERED_ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Bytes [start, start + num_bytes) of file `file_idx`."""

    file_idx: int
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPart:
    """A strided view of source `source_idx`: offset and strides in elements, shape (rows, columns)."""

    source_idx: int
    offset: int
    shape: tuple[int, int]
    strides: tuple[int, int]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantPart:
    """A quantised part: views of its codes, scales and zero points as stored (`quant_format.py` has the layouts).

    `shape` is the logical one, always (outputs, inputs), in transposed layers too. GGUF's blocks have no scales apart.
    """

    format: QuantFormat
    shape: tuple[int, int]
    codes: ExpertPart
    scales: ExpertPart | None
    zeros: ExpertPart | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayer:
    """One experts module. `spans[expert][source]` are the bytes; `up` and `down` the parts, the same for all experts.

    Parts of a matrix are concatenated along the output dimension, in order. `transposed`: a plain part is (in, out)
    rather than (out, in). `halves`: gate and up lie one after the other, where the module's own parameter has their
    outputs take turns. Biases are per-expert vectors that stay resident.
    """

    name: str
    num_experts: int
    top_k: int
    up: tuple[ExpertPart | QuantPart, ...]
    down: tuple[ExpertPart | QuantPart, ...]
    transposed: bool
    spans: tuple[tuple[Span, ...], ...]
    halves: bool = False

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert on disk."""
        return sum(span.num_bytes for span in self.spans[0])

    @property
    def bytes_per_weight(self) -> float:
        """Bytes on disk of one number: 2 for bfloat16, about 0.56 for int4 in groups of 32."""
        return self.expert_bytes / sum(math.prod(part.shape) for part in (*self.up, *self.down))

    @property
    def stored_parts(self) -> Iterator[ExpertPart]:
        """Every plain part in the order of use: those of `up`, then of `down`; a quantised one is two or three."""
        for part in (*self.up, *self.down):
            yield from stored_parts(part)

    @property
    def is_quantised(self) -> bool:
        """True when a matrix is stored in another form than floating point numbers side by side."""
        return any(isinstance(part, QuantPart) for part in (*self.up, *self.down))

    def width(self, part: ExpertPart | QuantPart) -> int:
        """The inputs that `part` takes."""
        return part.shape[0 if self.transposed and isinstance(part, ExpertPart) else 1]


def stored_parts(part: ExpertPart | QuantPart) -> tuple[ExpertPart, ...]:
    """Stored tensors of `part`: itself, or its codes, scales and zero points."""
    if isinstance(part, ExpertPart):
        return (part,)
    return tuple(stored for stored in (part.codes, part.scales, part.zeros) if stored is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One contiguous read: `num_bytes` from `start` to slot offset `slot_offset`, of which `need_bytes` must arrive."""

    file_idx: int
    start: int
    num_bytes: int
    slot_offset: int
    need_bytes: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Reads of one expert into a slot: the runs, and at which slot offset each source then begins."""

    runs: tuple[Run, ...]
    source_offsets: tuple[int, ...]
    slot_bytes: int


def plan_read(spans: tuple[Span, ...], *, align_bytes: int) -> ReadPlan:
    """Coalesce adjacent spans into runs, widened to bounds that are multiples of `align_bytes` (4096 for O_DIRECT).

    Published checkpoints keep an expert's tensors side by side, so most experts are one run.
    """
    order = sorted(range(len(spans)), key=lambda i: (spans[i].file_idx, spans[i].start))
    offsets = [0] * len(spans)
    runs: list[Run] = []
    slot_offset = 0
    for position, idx in enumerate(order):
        span = spans[idx]
        previous = spans[order[position - 1]] if position else None
        if (
            runs
            and previous
            and previous.file_idx == span.file_idx
            and previous.start + previous.num_bytes == span.start
        ):
            run = runs.pop()
            begin, slot_offset = run.start, run.slot_offset
        else:
            begin = span.start - span.start % align_bytes
        end = span.start + span.num_bytes
        padded_end = end + -end % align_bytes
        runs.append(
            Run(
                file_idx=span.file_idx, start=begin, num_bytes=padded_end - begin, slot_offset=slot_offset,
                need_bytes=end - begin,
            )
        )  # fmt: skip
        offsets[idx] = slot_offset + span.start - begin
        slot_offset += padded_end - begin
    return ReadPlan(runs=tuple(runs), source_offsets=tuple(offsets), slot_bytes=slot_offset)


@dataclass(frozen=True)
class ExpertIndex:
    """All MoE layers in forward order."""

    layers: tuple[MoeLayer, ...]

    def spans(self, key: ExpertKey) -> tuple[Span, ...]:
        """The byte ranges of one expert, one a source."""
        return self.layers[key.layer_idx].spans[key.expert_idx]

    def keys(self) -> Iterator[ExpertKey]:
        """Every expert, layer by layer."""
        for layer_idx, layer in enumerate(self.layers):
            for expert_idx in range(layer.num_experts):
                yield ExpertKey(layer_idx, expert_idx)

    @cached_property
    def num_experts(self) -> int:
        """Experts of all layers."""
        return sum(layer.num_experts for layer in self.layers)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all experts on disk."""
        return sum(span.num_bytes for layer in self.layers for spans in layer.spans for span in spans)

    @property
    def top_k(self) -> int:
        """The most experts that one token uses in one layer."""
        return max(layer.top_k for layer in self.layers)

    def slot_bytes(self, *, direct: bool) -> int:
        """Bytes of a slot that any expert fits into, read direct (aligned superset) or buffered."""
        return common_slot_bytes((self.spans(key) for key in self.keys()), direct=direct)


def common_slot_bytes(experts: Iterable[tuple[Span, ...]], *, direct: bool) -> int:
    """Bytes of a slot that any of `experts` fits into: their spans, aligned as they are read."""
    align = DIRECT_ALIGN_BYTES if direct else BUFFERED_ALIGN_BYTES
    need = max(plan_read(spans, align_bytes=align).slot_bytes for spans in experts)
    return need + -need % DIRECT_ALIGN_BYTES
