"""Facts that a plan needs of a model, from its config and headers alone: no torch, no transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offmoe.checkpoint.context_limit import context_limit
from offmoe.checkpoint.derived import DerivedEntry, StoredTensor
from offmoe.checkpoint.expert_index import BUFFERED_ALIGN_BYTES, Span, common_slot_bytes
from offmoe.checkpoint.index import CheckpointIndex, read_config
from offmoe.checkpoint.model_dtype import model_dtype
from offmoe.checkpoint.quant_config import read_quantisation
from offmoe.checkpoint.quantised import QuantEntry
from offmoe.checkpoint.tensor_entry import FLOAT_TYPES, ITEM_BITS, TensorEntry
from offmoe.core.errors import UnsupportedModelError
from offmoe.formats.layout import aligned
from offmoe.memory.family_facts import experts_per_token, facts_of_family
from offmoe.memory.planner import ModelSizes
from offmoe.memory.shape import LATENT_MATRIX, largest_number, shape_of, text_config
from offmoe.planner.inspect import EMBEDDING, is_tied, layer_of, loaded_tensors, num_hidden_layers
from offmoe.planner.packed import PackedSizes, find_packed

_KINDS = {"BF16": "bf16", "F16": "bf16", "F32": "f32", "F64": "f32"}
# Bytes a weight as `offmoe quantize` writes experts in groups of 32, scales in 16 bits.
QUANTISED_BYTES = {"int4": 0.5 + 2 / 32, "int8": 1 + 2 / 32}
# What the loader has of one batch of resident weights at once.
_BATCH_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Bytes on disk, except `sizes`, which are bytes in memory.

    `device_resident_bytes`: on a device quantised linears are unpacked. `dense_bytes` are those of the resident weights
    that every token reads: all but the embedding's other rows. `unused_bytes` are of tensors that are not loaded:
    layers beyond those of the model, for guessing tokens ahead. `is_off_lines`: in the files, not all parts of experts
    begin with a cache line. `tokenizer_bytes` are those of the tokenizer in memory.
    """

    name: str
    model_type: str
    config: dict[str, Any]
    sizes: ModelSizes
    num_layers: int
    num_moe_layers: int
    experts_total_bytes: int
    expert_bytes: int
    num_expert_weights: int
    resident_disk_bytes: int
    unused_bytes: int
    total_bytes: int
    dense_bytes: int
    device_resident_bytes: int
    expert_kind: str
    is_off_lines: bool
    item_bytes: int
    longest_context: int | None
    tokenizer_bytes: int = 0
    path: Path | None = None
    memory_bytes_an_expert: int | None = None
    packed: PackedSizes | None = None

    @property
    def routed_bytes(self) -> int:
        """Bytes of the experts of one token, all layers."""
        return self.num_moe_layers * self.sizes.top_k * self.expert_bytes

    @property
    def memory_expert_bytes(self) -> int:
        """Bytes of one expert in RAM, from where a token reads it."""
        return self.expert_bytes if self.memory_bytes_an_expert is None else self.memory_bytes_an_expert

    def as_packed(self) -> ModelFacts:
        """The same model as the CPU has it where bfloat16 is packed."""
        packed = self.packed
        assert packed is not None
        sizes = replace(
            self.sizes, slot_bytes=packed.slot_bytes, staging_bytes=packed.staging_bytes,
            resident_bytes=self.sizes.resident_bytes - packed.resident_saving, load_bytes=packed.load_bytes,
        )  # fmt: skip
        return replace(
            self, sizes=sizes, dense_bytes=self.dense_bytes - packed.dense_saving, expert_kind="packed",
            memory_bytes_an_expert=packed.slot_bytes, is_off_lines=False,
        )  # fmt: skip

    def with_experts_as(self, kind: str) -> ModelFacts:
        """The same model with its experts as `offmoe quantize` writes them."""
        expert_bytes = round(self.num_expert_weights * QUANTISED_BYTES[kind])
        slot = -(-expert_bytes // 4096 + -1) * 4096
        total = expert_bytes * self.sizes.num_experts
        return replace(
            self, sizes=replace(self.sizes, slot_bytes=slot, device_slot_bytes=aligned(expert_bytes)),
            expert_bytes=expert_bytes, experts_total_bytes=total, expert_kind=kind, is_off_lines=False,
            total_bytes=self.total_bytes - self.experts_total_bytes + total, packed=None,
        )  # fmt: skip


def read_facts(folder: Path, *, direct: bool) -> ModelFacts:
    """Facts of a folder or GGUF file; `direct`: experts are read past the page cache. Raises OffmoeError subclasses."""
    config = read_config(folder)
    index = CheckpointIndex.open(folder, read_quantisation(config))
    index.close()
    return facts_of(folder.name, config, index, direct=direct, path=folder)


def facts_of(
    name: str, config: dict[str, Any], index: CheckpointIndex, *, direct: bool, path: Path | None = None
) -> ModelFacts:
    """Facts of a checkpoint whose headers are known."""
    num_layers, loaded = num_hidden_layers(config), loaded_tensors(config, index.tensors)
    per_expert, stacked, resident = loaded.per_expert, loaded.stacked, loaded.resident
    spans, weights = _spans(per_expert, stacked)
    if not spans:
        raise UnsupportedModelError(
            f"{name} is a dense model ({config.get('model_type')}): it has no experts to stream; "
            "use transformers or llama.cpp"
        )
    item = ITEM_BITS[model_dtype(config, index.tensors.values(), is_gguf=index.is_gguf)] // 8
    expert_total = sum(span.num_bytes for one in spans.values() for span in one)
    memory = {entry.name: _memory_bytes(entry, item) for entry in resident}
    embedding = 0 if is_tied(config) else sum(size for n, size in memory.items() if EMBEDDING.search(n))
    vocab = largest_number(text_config(config), "vocab_size", 1)
    matrices = [memory[e.name] for e in resident if len(e.shape) == 2 and vocab not in e.shape]
    layers = {prefix for prefix, _ in spans}
    first = next(iter(per_expert))[2] if per_expert else stacked[0][0]
    model_type = str(config.get("model_type"))
    family = facts_of_family(model_type, text_config(config).get("model_type"))
    top_k = min(experts_per_token(config) or 1, len(spans) // len(layers))
    total_resident = sum(memory.values())
    sizes = ModelSizes(
        shape=shape_of(
            config, item_bytes=item, eager_attention=family.writes_scores,
            eager_on_device=family.writes_scores or family.has_sinks, largest_matrix_bytes=max(matrices, default=0),
        ),
        resident_bytes=total_resident,
        load_bytes=min(total_resident, _BATCH_BYTES + 2 * max(memory.values(), default=0)),
        slot_bytes=common_slot_bytes(spans.values(), direct=direct),
        device_slot_bytes=max(sum(aligned(span.num_bytes) for span in one) for one in spans.values()),
        num_experts=len(spans), top_k=top_k,
    )  # fmt: skip
    return ModelFacts(
        name=name, model_type=model_type, config=config, sizes=sizes, num_layers=num_layers or len(layers),
        num_moe_layers=len(layers), experts_total_bytes=expert_total, expert_bytes=expert_total // len(spans),
        num_expert_weights=weights // len(spans), resident_disk_bytes=sum(e.num_bytes for e in resident),
        unused_bytes=index.num_bytes - expert_total - sum(e.num_bytes for e in resident),
        total_bytes=index.num_bytes, dense_bytes=total_resident - embedding,
        device_resident_bytes=sum(_unpacked_bytes(entry, item) for entry in resident),
        expert_kind=_turned(config, stacked) or _kind(first), item_bytes=item,
        is_off_lines=any(span.start % BUFFERED_ALIGN_BYTES for one in spans.values() for span in one),
        longest_context=context_limit(config), path=path, tokenizer_bytes=index.tokenizer_bytes,
        packed=find_packed(
            per_expert, stacked, resident, total=total_resident, tied=is_tied(config),
            is_transposed=_turned(config, stacked) is not None,
            num_experts=len(spans) // len(layers),
        ),
    )  # fmt: skip


def _spans(
    per_expert: list[tuple[str, int, StoredTensor]], stacked: list[tuple[StoredTensor, int]]
) -> tuple[dict[tuple[str, int], tuple[Span, ...]], int]:
    """Byte ranges of experts by layer and number; and how many weights all have."""
    found: dict[tuple[str, int], list[Span]] = {}
    weights = 0
    for prefix, expert, entry in per_expert:
        weights += math.prod(entry.shape)
        spans = found.setdefault((prefix, expert), [])
        spans += [Span(file_idx=t.file_idx, start=t.start, num_bytes=t.num_bytes) for t in stored_tensors(entry)]
    for entry, count in stacked:
        weights += math.prod(entry.shape)
        for tensor in stored_tensors(entry):
            size = tensor.num_bytes // count
            for expert in range(count):
                span = Span(file_idx=tensor.file_idx, start=tensor.start + expert * size, num_bytes=size)
                found.setdefault((layer_of(entry.name), expert), []).append(span)
    return {key: tuple(spans) for key, spans in found.items()}, weights


def stored_tensors(entry: StoredTensor) -> Iterator[TensorEntry]:
    """The tensors of the files that `entry` is made of."""
    if isinstance(entry, TensorEntry):
        yield entry
        return
    for part in entry.stored if isinstance(entry, QuantEntry) else entry.sources:
        yield from stored_tensors(part)


def _memory_bytes(entry: StoredTensor, item: int) -> int:
    """In memory: floats as the model's type; codes as they are stored, where the CPU's kernels read them."""
    if isinstance(entry, QuantEntry) and len(entry.shape) == 2 and LATENT_MATRIX not in entry.name:
        return entry.num_bytes
    return _unpacked_bytes(entry, item)


def _unpacked_bytes(entry: StoredTensor, item: int) -> int:
    """Bytes as values of the model's type."""
    if isinstance(entry, (QuantEntry, DerivedEntry)) or entry.dtype in FLOAT_TYPES:
        return math.prod(entry.shape) * item
    return entry.num_bytes


def _turned(config: dict[str, Any], stacked: list[tuple[StoredTensor, int]]) -> str | None:
    """The name of plain experts that are stacked inputs by outputs, which are read more slowly."""
    width = largest_number(text_config(config), "hidden_size", 0)
    for entry, _ in stacked:
        if isinstance(entry, TensorEntry) and entry.name.endswith("gate_up_proj"):
            is_transposed = len(entry.shape) == 3 and entry.shape[1] == width != entry.shape[2]
            return f"{_kind(entry)} turned" if is_transposed and _kind(entry) == "bf16" else None
    return None


def _kind(entry: StoredTensor) -> str:
    """Form in which experts are stored, as bandwidths are named."""
    if isinstance(entry, QuantEntry):
        return entry.format.kind
    return _KINDS.get(entry.dtype, entry.dtype.lower())
