"""From transformers' conversion table and the headers to the expert index: which bytes are which expert."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from offmoe.checkpoint.derived import DerivedEntry, StoredTensor
from offmoe.checkpoint.expert_index import ExpertIndex, ExpertPart, MoeLayer, QuantPart, Span
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.quantised import QuantEntry, quant_part
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.core.errors import CheckpointError, UnsupportedModelError
from offmoe.formats.dense import torch_dtype
from offmoe.hf.adapters.base import AdaptedExperts
from offmoe.hf.internals import (
    KeyMapping,
    Target,
    expert_matrix,
    experts_modules,
    refuse_unknown_operations,
)
from offmoe.hf.strides import StridedMatrix, StridedPiece, transpose
from offmoe.memory.family_facts import TOP_K_NAMES


def streamed_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of an experts module that stay on disk: its stacked matrices. Biases and norms stay resident."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}


def map_experts(
    model: PreTrainedModel, index: CheckpointIndex, mapping: KeyMapping, targets: dict[str, Target]
) -> tuple[ExpertIndex, set[str]]:
    """The expert index of a meta-built model, and the checkpoint keys that it covers.

    Raises CheckpointError when config and tensors disagree and UnsupportedModelError for an experts module of another
    shape than gate/up and down.
    """
    by_param: dict[str, list[str]] = {}
    for key, target in targets.items():
        by_param.setdefault(target.param, []).append(key)
    layers, used = [], set()
    for module_name, module in experts_modules(model):
        params = streamed_parameters(module)
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        if set(params) != {up_name, "down_proj"}:
            raise UnsupportedModelError(
                f"{type(module).__name__} has the matrices {', '.join(sorted(params))}; "
                f"offmoe serves experts made of {up_name} and down_proj"
            )
        builder = _LayerBuilder(module_name, bool(module.is_transposed), index, mapping, targets)
        builder.takes_turns = not module.is_concatenated
        builder.has_surplus = isinstance(module, AdaptedExperts) and module.identity_beyond
        up = builder.add(up_name, params[up_name], by_param)
        down = builder.add("down_proj", params["down_proj"], by_param)
        used |= builder.used_keys
        layers.append(
            MoeLayer(
                name=module_name, num_experts=params[up_name].shape[0],
                top_k=_top_k(model, module, params[up_name].shape[0]), up=up, down=down,
                transposed=bool(module.is_transposed), halves=builder.halves,
                spans=tuple(tuple(source[e] for source in builder.spans) for e in range(params[up_name].shape[0])),
            )
        )  # fmt: skip
    return ExpertIndex(tuple(layers)), used


def _top_k(model: PreTrainedModel, module: torch.nn.Module, num_experts: int) -> int:
    if isinstance(module, AdaptedExperts):
        return min(module.top_k, num_experts)
    config = model.config.get_text_config()
    for name in TOP_K_NAMES:
        value = getattr(config, name, None)
        value = max(value) if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int) and value > 0:
            return min(value, num_experts)
    return 1


class _LayerBuilder:
    """Collects the sources of one layer: `spans[source][expert]`."""

    def __init__(
        self, module_name: str, transposed: bool, index: CheckpointIndex, mapping: KeyMapping,
        targets: dict[str, Target],
    ) -> None:  # fmt: skip
        self._module_name, self._transposed = module_name, transposed
        self._index, self._mapping, self._targets = index, mapping, targets
        self.spans: list[list[Span]] = []
        self.used_keys: set[str] = set()
        self.halves = False
        # Whether gate and up of the module's own parameter take turns.
        self.takes_turns = False
        # transformers saves up matrices for experts that compute nothing, too; they stand last, and nobody reads them.
        self.has_surplus = False

    def add(
        self, param_name: str, param: torch.nn.Parameter, by_param: dict[str, list[str]]
    ) -> tuple[ExpertPart | QuantPart, ...]:
        """Find the tensors of one parameter; returns the parts of an expert's matrix."""
        where = f"{self._module_name}.{param_name}"
        keys = by_param.get(where, [])
        halves = [f"{self._module_name}.{half}_proj" for half in ("gate", "up")]
        if not keys and param_name == "gate_up_proj" and all(half in by_param for half in halves):
            return self._add_halves(halves, param, where)
        if not keys:
            raise CheckpointError(
                f"the checkpoint has no tensor for {where} of shape {list(param.shape)}, which config.json asks for; "
                "config and tensors are of different models"
            )
        self.used_keys.update(keys)
        pattern = self._targets[keys[0]].pattern
        order, operations = ([where], []) if pattern is None else (
            self._mapping.sources(pattern), self._mapping.operations(pattern)
        )  # fmt: skip
        refuse_unknown_operations(operations, where=where)
        by_pattern: dict[str, list[StoredTensor]] = {}
        for key in keys:
            by_pattern.setdefault(self._targets[key].pattern or where, []).append(self._index.tensors[key])
        sources = {name: self._source(entries, param, where) for name, entries in by_pattern.items()}
        shapes = {name: source.shape for name, source in sources.items()}
        expected = (param.shape[1], param.shape[2])
        matrix = expert_matrix(shapes, order, operations, expected, where=where)
        if self._transposed and not operations and all(self._is_turned(source.entry) for source in sources.values()):
            matrix = transpose(matrix)
        return self._cut(matrix, sources, expected, where)

    def _add_halves(
        self, halves: list[str], param: torch.nn.Parameter, where: str
    ) -> tuple[ExpertPart | QuantPart, ...]:
        """Gate and up stacked apart where the module has them in one parameter: two parts, one after the other."""
        self.halves = self.takes_turns
        self.used_keys.update(halves)
        sources = {half: self._source([self._index.tensors[half]], param, where) for half in halves}
        shapes = {half: source.shape for half, source in sources.items()}
        pieces: list[StridedPiece] = []
        for half in halves:
            matrix = expert_matrix({half: shapes[half]}, [half], [], (0, 0), where=where)
            pieces += (transpose(matrix) if self._transposed else matrix).pieces
        matrix = StridedMatrix(tuple(pieces), 1 if self._transposed else 0)
        return self._cut(matrix, sources, (param.shape[1], param.shape[2]), where)

    def _is_turned(self, entry: StoredTensor) -> bool:
        """Published as (experts, out, in), whatever the module's parameter is."""
        return self._index.is_gguf or (isinstance(entry, QuantEntry) and entry.format.kind == "mxfp4")

    def _cut(
        self, matrix: StridedMatrix, sources: dict[str, _Source], expected: tuple[int, int], where: str
    ) -> tuple[ExpertPart | QuantPart, ...]:
        if matrix.shape != expected:
            raise CheckpointError(
                f"{where}: config.json says {list(expected)} an expert, the checkpoint holds {list(matrix.shape)}; "
                "config and tensors are of different models"
            )
        output_axis = 1 if self._transposed else 0
        if len(matrix.pieces) > 1 and matrix.axis != output_axis:
            raise UnsupportedModelError(f"{where}: parts joined along the input dimension are not read yet")
        return tuple(_part(piece, sources[piece.source], output_axis, where) for piece in matrix.pieces)

    def _source(self, entries: list[StoredTensor], param: torch.nn.Parameter, where: str) -> _Source:
        """Register what one pattern found: a stacked tensor or one tensor per expert, and its scales with it."""
        num_experts = param.shape[0]
        if len(entries) == 1:
            entries = [_stacked(entries[0], num_experts)]
        elif self.has_surplus:
            entries = entries[:num_experts]
        first = entries[0]
        kind = _kind(first)
        if len(first.shape) == 3:
            if len(entries) != 1 or first.shape[0] != num_experts:
                raise CheckpointError(
                    f"{where}: config.json says {num_experts} experts, {first.name!r} holds {first.shape[0]}"
                )
        else:
            if len(entries) != num_experts:
                raise CheckpointError(
                    f"{where}: config.json says {num_experts} experts, the checkpoint holds {len(entries)} "
                    f"(first {first.name!r}); a shard is missing or the config is of another model"
                )
            odd = [e for e in entries if (e.shape, _kind(e)) != (first.shape, kind) or len(e.shape) != 2]
            if odd:
                raise CheckpointError(
                    f"{odd[0].name!r} is {odd[0].dtype} {list(odd[0].shape)}, {first.name!r} is {first.dtype} "
                    f"{list(first.shape)}; experts of one layer must be alike"
                )
        sources = []
        for stored in zip(*map(_stored, entries), strict=True):
            sources.append(len(self.spans))
            is_stacked = len(first.shape) == 3
            self.spans.append(_slices(stored[0], num_experts) if is_stacked else [_span(entry) for entry in stored])
        return _Source(first, tuple(sources), (first.shape[-2], first.shape[-1]))


@dataclass(frozen=True, slots=True)
class _Source:
    """One pattern's tensors: the first, the numbers of their sources, and the shape of one expert's matrix."""

    entry: StoredTensor
    sources: tuple[int, ...]
    shape: tuple[int, int]


def _stacked(entry: StoredTensor, num_experts: int) -> StoredTensor:
    """A 2-D tensor that holds the rows of all experts, one after another (DBRX), as the 3-D tensor that it is."""
    if not isinstance(entry, TensorEntry) or len(entry.shape) != 2 or num_experts == 1 or entry.shape[0] % num_experts:
        return entry
    return dataclasses.replace(entry, shape=(num_experts, entry.shape[0] // num_experts, entry.shape[1]))


def _stored(entry: StoredTensor) -> tuple[TensorEntry, ...]:
    assert not isinstance(entry, DerivedEntry), f"{entry=}: experts are read as they are"
    return entry.stored if isinstance(entry, QuantEntry) else (entry,)


def _kind(entry: StoredTensor) -> tuple[object, ...]:
    """Properties that all experts of a layer share."""
    if isinstance(entry, QuantEntry):
        return (entry.format, *(stored.dtype for stored in entry.stored))
    torch_dtype(entry.dtype, where=f"tensor {entry.name!r}")
    return (entry.dtype,)


def _span(entry: TensorEntry) -> Span:
    return Span(file_idx=entry.file_idx, start=entry.start, num_bytes=entry.num_bytes)


def _slices(entry: TensorEntry, num_experts: int) -> list[Span]:
    """One span an expert of a stacked tensor."""
    size = entry.num_bytes // num_experts
    return [Span(file_idx=entry.file_idx, start=entry.start + e * size, num_bytes=size) for e in range(num_experts)]


def _part(piece: StridedPiece, source: _Source, output_axis: int, where: str) -> ExpertPart | QuantPart:
    if not isinstance(source.entry, QuantEntry):
        return ExpertPart(
            source_idx=source.sources[0], offset=piece.offset, shape=piece.shape, strides=piece.strides,
            dtype=source.entry.dtype,
        )  # fmt: skip
    width = source.shape[1]
    row_stride, whole_rows = piece.strides[output_axis], piece.shape[1 - output_axis] == width
    part = None
    if whole_rows and piece.strides[1 - output_axis] == 1 and not (piece.offset % width or row_stride % width):
        part = quant_part(
            source.entry, source.sources, first_row=piece.offset // width, num_rows=piece.shape[output_axis],
            row_step=row_stride // width,
        )  # fmt: skip
    if part is None:
        raise UnsupportedModelError(
            f"{where}: {source.entry.name!r} ({source.entry.dtype}) is cut or turned across its scales, which is not "
            "read yet; use the bfloat16 version"
        )
    return part
