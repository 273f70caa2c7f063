"""Plan of what `offmoe quantize` writes: which matrices become integers, under which names, in which order.

Experts keep the names of their tensors where each has tensors of its own. Where a layer's experts are stacked, they get
names that transformers' own conversion table puts back where they came from: one tensor an expert and matrix, which
is what other engines read too. A family without such names is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from offmoe.checkpoint.expert_index import ExpertIndex, ExpertPart, MoeLayer
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.checkpoint.tensor_entry import FLOAT_TYPES, ITEM_BITS, TensorEntry
from offmoe.checkpoint.writer import PlannedShard, PlannedTensor
from offmoe.core.errors import UnsupportedModelError, UsageError
from offmoe.formats.encode import integer_format
from offmoe.hf.door import PreTrainedModel
from offmoe.hf.internals import KeyMapping, Target, expert_matrix

GROUPS = (32, 64, 128)
IntegerFormat = Literal["int8", "int4"]
# A shard is what a run that is cut off may have to write again.
SHARD_BYTES = 1 << 30
# One expert and matrix each, as the hub has them: gate, up, down.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_IN_LAYER = re.compile(r"\blayers\.\d+\.")
_NOT_TEXT = re.compile(r"vis|image|audio|speech|talker|code2wav")
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "wg"})
# Scales are as precise as what they replace: other engines multiply in the scale's type.
_SCALE_TYPES = {"BF16": "BF16", "F16": "F16", "F32": "F32", "F64": "F32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMatrix:
    """A matrix (N outputs, K inputs) to be encoded: its rows lie one after the other from byte `start` of a file."""

    name: str
    shape: tuple[int, int]
    dtype: str
    file_idx: int
    start: int
    format: QuantFormat

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the source."""
        return self.shape[1] * ITEM_BITS[self.dtype] // 8

    @property
    def num_bytes(self) -> int:
        """Bytes in the source."""
        return self.shape[0] * self.row_bytes

    @property
    def written(self) -> tuple[PlannedTensor, PlannedTensor]:
        """Codes and scales, side by side."""
        rows, width = self.shape
        words = width * (4 if self.format.kind == "int4" else 8) // 32
        return (
            PlannedTensor(name=f"{self.name}.weight_packed", dtype="I32", shape=(rows, words)),
            PlannedTensor(
                name=f"{self.name}.weight_scale", dtype=self.format.scale_dtype,
                shape=(rows, width // self.format.group),
            ),
        )  # fmt: skip

    @property
    def written_shape(self) -> PlannedTensor:
        """compressed-tensors' `weight_shape`."""
        return PlannedTensor(name=f"{self.name}.weight_shape", dtype="I64", shape=(2,))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One file: the shapes of its matrices, then `items` in order. Tensors are copied as they are."""

    items: tuple[PlannedMatrix | TensorEntry, ...]

    @property
    def matrices(self) -> tuple[PlannedMatrix, ...]:
        """Those of `items` that are encoded."""
        return tuple(item for item in self.items if isinstance(item, PlannedMatrix))

    @property
    def planned(self) -> PlannedShard:
        """The plan as the writer takes it. Shapes come first: an expert's codes and scales are one contiguous read."""
        tensors = [matrix.written_shape for matrix in self.matrices]
        align_from = len(tensors)
        for item in self.items:
            tensors += item.written if isinstance(item, PlannedMatrix) else [
                PlannedTensor(name=item.name, dtype=item.dtype, shape=item.shape)
            ]  # fmt: skip
        return PlannedShard(tensors=tuple(tensors), align_from=align_from)


@dataclass(frozen=True, kw_only=True)
class QuantisePlan:
    """All shards, and the modules whose linear layers stay as they are. Bytes are those of the source."""

    shards: tuple[ShardPlan, ...]
    ignored: tuple[str, ...]
    num_experts: int
    num_dense: int
    source_bytes: int

    @property
    def written_bytes(self) -> int:
        """Bytes of all tensors after."""
        return sum(shard.planned.num_bytes for shard in self.shards)


def plan_quantization(
    model: PreTrainedModel, index: CheckpointIndex, mapping: KeyMapping, targets: dict[str, Target],
    experts: ExpertIndex, expert_keys: set[str], *, kind: IntegerFormat, dense: IntegerFormat | None, group: int,
    head: IntegerFormat | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> QuantisePlan:  # fmt: skip
    """Decide for every tensor of `index`. Nothing is read. `dense` is what other linear layers become, `head` what the
    output head does.

    Raises UsageError when `group` does not divide an expert's width, naming the tensor and the groups that do, and
    UnsupportedModelError for a family whose experts have no names of their own.
    """
    chosen = []
    for expert in _experts(experts, index, mapping):
        _refuse_group(expert, group)
        chosen.append(tuple(_matrix(named, group, kind) for named in expert))
    linear = dict(_dense(model, index, targets, group, dense, head))
    rest: list[tuple[PlannedMatrix | TensorEntry, ...]] = []
    ignored = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for key, entry in index.tensors.items():
        if key in expert_keys or not isinstance(entry, TensorEntry):
            continue
        rest.append((linear.get(key, entry),))
        if key not in linear and len(entry.shape) == 2 and key.endswith(".weight"):
            ignored.add(key.removesuffix(".weight"))
    done = {targets[key].param.removesuffix(".weight") for key in linear} | {m.name for m in linear.values()}
    return QuantisePlan(
        shards=tuple(_shards([*rest, *chosen], shard_bytes)), ignored=tuple(sorted(ignored - done)),
        num_experts=experts.num_experts, num_dense=len(linear), source_bytes=index.num_bytes,
    )  # fmt: skip


Named = tuple[str, tuple[int, int], str, int, int]  # name, shape, dtype, file_idx, start


def _matrix(named: Named, group: int, kind: IntegerFormat) -> PlannedMatrix:
    name, shape, dtype, file_idx, start = named
    form = integer_format(kind, group=group, scale_dtype=_SCALE_TYPES[dtype])
    return PlannedMatrix(name=name, shape=shape, dtype=dtype, file_idx=file_idx, start=start, format=form)


def _refuse_group(expert: list[Named], group: int) -> None:
    """All experts of a layer are alike, so one is looked at."""
    widths = {shape[1] for _, shape, *_ in expert}
    odd = next(((name, shape[1]) for name, shape, *_ in expert if shape[1] % group), None)
    if odd is None:
        return
    fitting = [str(size) for size in GROUPS if not any(width % size for width in widths)]
    advice = f"use --group {' or '.join(fitting)}" if fitting else (
        f"the experts have widths of {' and '.join(map(str, sorted(widths)))}, and none of "
        f"{', '.join(map(str, GROUPS))} divides them all: this model cannot be quantised"
    )  # fmt: skip
    raise UsageError(f"--group {group} does not divide the {odd[1]} columns of {odd[0]!r}; {advice}")


def _experts(experts: ExpertIndex, index: CheckpointIndex, mapping: KeyMapping) -> Iterator[list[Named]]:
    """The matrices of every expert, layer by layer: gate, up, down."""
    names = {
        (entry.file_idx, entry.start): key.removesuffix(".weight")
        for key, entry in index.tensors.items()
        if isinstance(entry, TensorEntry) and len(entry.shape) == 2 and key.endswith(".weight")
    }
    for layer in experts.layers:
        if layer.transposed:
            raise _refused(layer, "are stored turned, (inputs, outputs), which no other engine reads as integers")
        stacked = (layer.spans[0][0].file_idx, layer.spans[0][0].start) not in names
        templates = _templates(layer, mapping) if stacked else None
        for expert_idx in range(layer.num_experts):
            places = [place for part in (*layer.up, *layer.down) for place in _places(layer, expert_idx, part)]
            if templates is None:
                yield [(_named(names, place, layer), *place) for place in places]
                continue
            if len(places) == 2:  # gate and up are one matrix
                (shape, dtype, file_idx, start), down = places
                half = (shape[0] // 2, shape[1])
                places = [(half, dtype, file_idx, start), (half, dtype, file_idx, start + _bytes(half, dtype)), down]
            yield [(name.format(expert_idx), *place) for name, place in zip(templates, places, strict=True)]


PlannedPlace = tuple[tuple[int, int], str, int, int]


def _bytes(shape: tuple[int, int], dtype: str) -> int:
    return shape[0] * shape[1] * ITEM_BITS[dtype] // 8


def _places(layer: MoeLayer, expert_idx: int, part: object) -> Iterator[PlannedPlace]:
    assert isinstance(part, ExpertPart), "a quantised source is refused before"
    if part.strides != (part.shape[1], 1):
        raise _refused(layer, "have rows that do not lie one after the other")
    span = layer.spans[expert_idx][part.source_idx]
    yield part.shape, part.dtype, span.file_idx, span.start + part.offset * ITEM_BITS[part.dtype] // 8


def _named(names: dict[tuple[int, int], str], place: PlannedPlace, layer: MoeLayer) -> str:
    name = names.get(place[2:])
    if name is None:
        raise _refused(layer, "share tensors in a way that has no names for one matrix each")
    return name


def _templates(layer: MoeLayer, mapping: KeyMapping) -> tuple[str, str, str]:
    """Names with a place for the expert's number that transformers puts together as `layer` is."""
    rows, width = sum(part.shape[0] for part in layer.up), layer.up[0].shape[1]
    half = (rows // 2, width)
    for words in _NAMES:
        found = tuple(f"{layer.name}.{{}}.{word}" for word in words)
        targets = mapping.targets(f"{name.format(0)}.weight" for name in found)
        gate, up, down = (targets[f"{name.format(0)}.weight"] for name in found)
        if (gate.param, up.param, down.param) != (
            f"{layer.name}.gate_up_proj", f"{layer.name}.gate_up_proj", f"{layer.name}.down_proj",
        ) or gate.pattern is None or up.pattern is None or down.pattern is None:  # fmt: skip
            continue
        joined = expert_matrix(
            {gate.pattern: half, up.pattern: half}, mapping.sources(gate.pattern), mapping.operations(gate.pattern),
            (rows, width), where=layer.name,
        )  # fmt: skip
        kept = [(piece.source, piece.offset, piece.shape) for piece in joined.pieces]
        if joined.axis == 0 and kept == [(gate.pattern, 0, half), (up.pattern, 0, half)]:
            return (found[0], found[1], found[2])
    raise _refused(layer, "are stacked tensors for which transformers has no names of one expert each")


def _refused(layer: MoeLayer, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the experts of {layer.name!r} {why}; this model cannot be quantised yet")


def _dense(
    model: PreTrainedModel, index: CheckpointIndex, targets: dict[str, Target], group: int, dense: IntegerFormat | None,
    head: IntegerFormat | None,
) -> Iterator[tuple[str, PlannedMatrix]]:  # fmt: skip
    """Linear layers of the text model's layers, but routers, as `dense`, and the output head as `head`; not where
    `group` does not divide the width. Raises UsageError for a head that is the embeddings, which stay.
    """
    modules, output = dict(model.named_modules()), model.get_output_embeddings()
    tied = {name.removesuffix(".weight") for name in model.all_tied_weights_keys}
    if head is not None and (output is None or any(modules.get(name) is output for name in tied)):
        raise UsageError("this model's output head is its embeddings, which stay; leave out --head")
    for key, target in targets.items():
        name, entry = target.param.removesuffix(".weight"), index.tensors[key]
        if target.pattern is not None or not isinstance(modules.get(name), torch.nn.Linear):
            continue
        in_layer = _IN_LAYER.search(name) and not _NOT_TEXT.search(name) and name.rpartition(".")[2] not in _ROUTERS
        kind = head if modules[name] is output else dense if in_layer else None
        assert isinstance(entry, TensorEntry)
        fits = len(entry.shape) == 2 and entry.shape[1] % group == 0 and entry.dtype in FLOAT_TYPES
        if kind is not None and fits and key.endswith(".weight"):
            shape = (entry.shape[0], entry.shape[1])
            yield (
                key,
                _matrix((key.removesuffix(".weight"), shape, entry.dtype, entry.file_idx, entry.start), group, kind),
            )


def _shards(items: list[tuple[PlannedMatrix | TensorEntry, ...]], shard_bytes: int) -> Iterator[ShardPlan]:
    """Cut between experts, never inside of one."""
    shard: list[PlannedMatrix | TensorEntry] = []
    size = 0
    for item in items:
        num_bytes = sum(_written_bytes(part) for part in item)
        if shard and size + num_bytes > shard_bytes:
            yield ShardPlan(items=tuple(shard))
            shard, size = [], 0
        shard += item
        size += num_bytes
    yield ShardPlan(items=tuple(shard))


def _written_bytes(item: PlannedMatrix | TensorEntry) -> int:
    if isinstance(item, TensorEntry):
        return item.num_bytes
    return sum(tensor.num_bytes for tensor in (*item.written, item.written_shape))
