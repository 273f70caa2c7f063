"""A checkpoint described from its config and headers alone, in milliseconds: no torch, no transformers.

Which tensors are experts is told by name and shape here; the loader asks transformers. A test holds both equal on
every family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offmoe.checkpoint.context_limit import context_limit
from offmoe.checkpoint.derived import StoredTensor
from offmoe.checkpoint.index import CheckpointIndex, read_config
from offmoe.checkpoint.needless import is_beyond, needless_kind, tower_kind
from offmoe.checkpoint.quant_config import read_quantisation
from offmoe.core.errors import CheckpointError, UnsupportedModelError
from offmoe.memory.family_facts import EXPERT_COUNT_NAMES, experts_per_token, whole_numbers
from offmoe.memory.shape import text_config
from offmoe.planner.packed_sample import PackedSample, sample_packed

# layers.3.mlp.experts.17.gate_proj.weight -> ("layers.3.mlp.experts", 17)
# decoder.block.1.layer.2.mlp.experts.expert_17.wi.weight -> ("decoder.block.1.layer.2.mlp.experts", 17)
_ONE_EXPERT = re.compile(r"^(.*\bexperts?)\.(?:expert_)?(\d+)\.")
# DBRX: the rows of all experts in one 2-D tensor.
_ROWS_OF_ALL = re.compile(r"\bexperts\.mlp\.(w1|v1|w2)$")
# JetMoE's attention has experts too, which stay resident.
_RESIDENT = re.compile(r"\bself_attention\.|conv")
_EXPERTS = re.compile(r"^(.*\bexperts?)\.")
EMBEDDING = re.compile(r"\b(embed_tokens|wte|word_embeddings|tok_embeddings)\.weight$")
_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Contents of a checkpoint. Bytes on disk; `resident` is everything that is loaded and no routed expert.

    `unused_bytes` are of tensors that are not loaded: layers beyond the last, for guessing tokens ahead, a tied head
    that is stored too, parts of other modalities. The numbers are those of `offmoe plan`. `packed`: what the first
    experts would take in 12 bits, of bfloat16 ones that are there.
    """

    model_type: str
    architecture: str
    num_layers: int
    num_moe_layers: int
    experts_per_layer: int
    top_k: int
    expert_bytes: int
    experts_total_bytes: int
    resident_bytes: int
    unused_bytes: int
    total_bytes: int
    layout: str
    formats: dict[str, int]
    num_files: int
    num_tensors: int
    context_length: int | None
    packed: PackedSample | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def bytes_per_token(self) -> int:
        """Expert bytes that one token uses."""
        return self.num_moe_layers * self.top_k * self.expert_bytes


def inspect_checkpoint(folder: Path) -> Inspection:
    """Describe the checkpoint in `folder`. Raises CheckpointError, or UnsupportedModelError for a dense model."""
    config = read_config(folder)
    index = CheckpointIndex.open(folder, read_quantisation(config))
    index.close()
    loaded = loaded_tensors(config, index.tensors)
    per_expert, stacked = loaded.per_expert, loaded.stacked
    if not per_expert and not stacked:
        raise UnsupportedModelError(
            f"{folder} is a dense model ({config.get('model_type')}): it has no experts to stream; "
            "use transformers or llama.cpp"
        )
    experts = [entry for _, _, entry in per_expert] + [entry for entry, _ in stacked]
    layers = {prefix for prefix, _, _ in per_expert} | {layer_of(entry.name) for entry, _ in stacked}
    num_experts = max([idx + 1 for _, idx, _ in per_expert] + [count for _, count in stacked])
    expert_total = sum(entry.num_bytes for entry in experts)
    resident_total = sum(entry.num_bytes for entry in loaded.resident)
    return Inspection(
        model_type=str(config.get("model_type")),
        architecture=_architecture(config),
        num_layers=num_hidden_layers(config),
        num_moe_layers=len(layers),
        experts_per_layer=num_experts,
        top_k=experts_per_token(config),
        expert_bytes=expert_total // (len(layers) * num_experts),
        experts_total_bytes=expert_total,
        resident_bytes=resident_total,
        unused_bytes=index.num_bytes - expert_total - resident_total,
        total_bytes=index.num_bytes,
        layout="one tensor per expert" if per_expert else "stacked tensors",
        formats=index.formats,
        num_files=len(index.files),
        num_tensors=len(index.stored),
        context_length=context_limit(config),
        packed=sample_packed([file.path for file in index.files], per_expert, stacked),
    )


@dataclass(frozen=True, kw_only=True)
class LoadedTensors:
    """The tensors of a checkpoint that a model is made of. Experts as `find_experts` gives them."""

    per_expert: list[tuple[str, int, StoredTensor]]
    stacked: list[tuple[StoredTensor, int]]
    resident: list[StoredTensor]


def loaded_tensors(config: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> LoadedTensors:
    """Leave out what the loader does: layers beyond the last, needless tensors, towers of a text model, a tied head."""
    num_layers, names = num_hidden_layers(dict(text_config(config))), config.get("architectures")
    has_towers = not (isinstance(names, list) and names and str(names[0]).endswith("ForCausalLM"))
    used = {
        n: e for n, e in tensors.items()
        if not is_beyond(n, num_layers) and needless_kind(n) is None and (has_towers or tower_kind(n) is None)
    }  # fmt: skip
    per_expert, stacked = find_experts(used.values(), whole_numbers(config, EXPERT_COUNT_NAMES))
    experts = {entry.name for _, _, entry in per_expert} | {entry.name for entry, _ in stacked}
    resident = [entry for n, entry in used.items() if n not in experts]
    if is_tied(config) and any(EMBEDDING.search(entry.name) for entry in resident):
        resident = [entry for entry in resident if not entry.name.endswith("lm_head.weight")]
    return LoadedTensors(per_expert=per_expert, stacked=stacked, resident=resident)


def is_tied(config: dict[str, Any]) -> bool:
    """The head is the embedding's matrix."""
    return bool(text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def num_hidden_layers(config: dict[str, Any]) -> int:
    """Layers of the model; 0 where its config does not say."""
    return max(whole_numbers(config, ("num_hidden_layers", "num_layers", "n_layer")), default=0)


def find_experts(
    entries: Iterable[StoredTensor], counts: set[int]
) -> tuple[list[tuple[str, int, StoredTensor]], list[tuple[StoredTensor, int]]]:
    """(prefix, expert, tensor) of experts with tensors of their own, and (tensor, experts) of stacked ones."""
    per_expert, stacked = [], []
    for entry in entries:
        match = _ONE_EXPERT.match(entry.name)
        if match and len(entry.shape) == 2:
            per_expert.append((match.group(1), int(match.group(2)), entry))
        elif len(entry.shape) == 3 and entry.shape[0] in counts and _are_matrices(entry):
            stacked.append((entry, entry.shape[0]))
        elif len(entry.shape) == 2 and len(counts) == 1 and _ROWS_OF_ALL.search(entry.name):
            stacked.append((entry, next(iter(counts))))
    return per_expert, stacked


def _are_matrices(entry: StoredTensor) -> bool:
    """Not the experts of an attention, nor a convolution, which may have as many channels as there are experts."""
    return min(entry.shape[1:]) > 1 and not _RESIDENT.search(entry.name)


def layer_of(name: str) -> str:
    """Common part of the names of a layer's stacked experts."""
    match = _EXPERTS.match(name) or _LAYER.match(name)
    return match.group(1) if match else name


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    if names is not None and (not isinstance(names, list) or not all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"config.json has architectures {names!r}; expected a list of names")
    return names[0] if names else "unknown"
