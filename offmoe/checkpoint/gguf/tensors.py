"""A GGUF file's tensors under the names that the published safetensors have, so that all that follows is the same.

Stacked experts become one entry an expert. What llama.cpp's converter changed is said in `gguf_architecture` and undone
when it is read: DerivedEntry has the ways. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.derived import StoredTensor
from offmoe.checkpoint.gguf.architecture import Architecture
from offmoe.checkpoint.gguf.architectures import ARCHITECTURES
from offmoe.checkpoint.gguf.header import GgufHeader, GgufTensor
from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantFormat
from offmoe.checkpoint.quantised import QuantEntry
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.core.errors import CheckpointError, UnsupportedModelError

_IN_LAYER = re.compile(r"blk\.(\d{1,5})\.(.+)")
_EXPERTS = re.compile(r"ffn_(gate|up|down|gate_up)(?:_exps|\.(\d{1,5}))\.weight")
# Values that the config has (`gguf_rope`), or that follow from it.
_TABLES = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|(blk\.\d+\.)?attn_rot_embd(\..*)?")


def gguf_tensors(header: GgufHeader, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """All tensors by published name. `config` is `gguf_config`'s. Raises UnsupportedModelError naming a tensor that the
    architecture is not known to have. Layers behind the last one are heads for further tokens, and left out.
    """
    architecture = ARCHITECTURES[header.architecture]
    parts = {name for names in architecture.joins for name in names}
    num_layers = config.get("num_hidden_layers", config.get("n_layers", 0))
    found: dict[str, StoredTensor] = {}
    apart: dict[tuple[int, str], GgufTensor] = {}
    for name, tensor in header.tensors.items():
        match = _IN_LAYER.fullmatch(name)
        if _TABLES.fullmatch(name) or (match and int(match[1]) >= num_layers):
            continue
        if match and match[2] in parts and not _is_whole(header, int(match[1]), match[2], architecture):
            apart[int(match[1]), match[2]] = tensor
            continue
        inside = _in_layer(int(match[1]), match[2], tensor, architecture, config) if match else None
        for entry in _outside(name, tensor, architecture) if inside is None else inside:
            if entry.name in found:
                raise CheckpointError(
                    f"the GGUF file has {entry.name!r} in two layouts; get another conversion of the model"
                )
            found[entry.name] = entry
    for entry in _joined(apart, architecture, config):
        found[entry.name] = entry
    return found


def _is_whole(header: GgufHeader, layer: int, leaf: str, architecture: Architecture) -> bool:
    """True for a tensor that the layer also has as it is published, so that it is no part of one."""
    partners = next(names for names in architecture.joins if leaf in names)
    return leaf.rpartition(".")[0] in architecture.modules and not all(
        f"blk.{layer}.{name}" in header.tensors for name in partners
    )


def _outside(name: str, tensor: GgufTensor, architecture: Architecture) -> Iterator[StoredTensor]:
    stem, _, suffix = name.rpartition(".")
    target = architecture.outside.get(name)
    if target is None and stem in architecture.outside and (suffix == "weight" or stem in architecture.biased):
        target = f"{architecture.outside[stem]}.{suffix}"
    if target is None:
        raise _unknown(name)
    yield _undone(_entry(tensor, target), stem, architecture, {})


def _in_layer(
    layer: int, leaf: str, tensor: GgufTensor, architecture: Architecture, config: Mapping[str, Any]
) -> Iterator[StoredTensor]:
    prefix = f"{architecture.layer}{layer}."
    experts = _EXPERTS.fullmatch(leaf)
    stem, _, suffix = leaf.rpartition(".")
    if experts:
        yield from _experts(prefix, experts[1], experts[2], tensor, architecture)
    elif leaf in architecture.parameters:
        yield _undone(_entry(tensor, prefix + architecture.parameters[leaf]), leaf, architecture, config)
    elif stem in architecture.modules and (suffix == "weight" or (suffix == "bias" and stem in architecture.biased)):
        yield _undone(_entry(tensor, f"{prefix}{architecture.modules[stem]}.{suffix}"), stem, architecture, config)
    elif stem == "attn_qkv" and "attn_v" in architecture.modules:
        for name, part in _split_qkv(tensor, config):
            yield from _in_layer(layer, f"{name}.{suffix}", part, architecture, config)
    else:
        raise _unknown(f"blk.{layer}.{leaf}")


def _split_qkv(tensor: GgufTensor, config: Mapping[str, Any]) -> Iterator[tuple[str, GgufTensor]]:
    """Queries, keys and values that are stored in one matrix, one below the other."""
    num_rows, keys = tensor.shape[0], config["num_key_value_heads"] * config["head_dim"]
    if num_rows <= 2 * keys:
        raise CheckpointError(
            f"{tensor.entry.name!r} has {num_rows} rows, of which keys and values are {2 * keys}; get another "
            "conversion of the model"
        )
    row_bytes, first = tensor.entry.num_bytes // num_rows, 0
    for name, count in (("attn_q", num_rows - 2 * keys), ("attn_k", keys), ("attn_v", keys)):
        entry = replace(
            tensor.entry, shape=(count, *tensor.entry.shape[1:]), start=tensor.entry.start + first * row_bytes,
            num_bytes=count * row_bytes,
        )  # fmt: skip
        yield name, GgufTensor(kind=tensor.kind, shape=(count, *tensor.shape[1:]), entry=entry)
        first += count


def _undone(
    entry: TensorEntry | QuantEntry, leaf: str, architecture: Architecture, config: Mapping[str, Any]
) -> StoredTensor:
    undo = architecture.undo.get(leaf)
    return entry if undo is None else undo(entry, config)


def _experts(
    prefix: str, part: str, number: str | None, tensor: GgufTensor, architecture: Architecture
) -> Iterator[StoredTensor]:
    """A stacked tensor as one entry an expert, or whole; or the one expert of the files of 2023."""
    if number is not None:
        if part not in architecture.experts:
            raise _unknown(tensor.entry.name)
        yield _entry(tensor, prefix + architecture.experts[part].replace("*", number))
        return
    if len(tensor.shape) != 3:
        raise CheckpointError(f"{tensor.entry.name!r} has shape {list(tensor.shape)}, experts are stacked in three")
    if part in architecture.stacked:
        yield _entry(tensor, prefix + architecture.stacked[part])
    elif part in architecture.experts:
        yield from _split(tensor, prefix + architecture.experts[part])
    elif part == "gate_up" and architecture.experts and tensor.shape[1] % 2 == 0:
        half = tensor.shape[1] // 2
        for idx, name in enumerate(("gate", "up")):
            yield from _split(tensor, prefix + architecture.experts[name], idx * half, half)
    else:
        raise _unknown(tensor.entry.name)


def _split(
    tensor: GgufTensor, pattern: str, first_row: int = 0, num_rows: int | None = None
) -> Iterator[TensorEntry | QuantEntry]:
    """One entry an expert of a stacked tensor, or of some of its rows."""
    num_experts, all_rows, columns = tensor.shape
    entry, num_rows = tensor.entry, num_rows or all_rows
    row_bytes = entry.num_bytes // (num_experts * all_rows)
    for idx in range(num_experts):
        start = entry.start + (idx * all_rows + first_row) * row_bytes
        one = replace(entry, shape=(num_rows, entry.shape[-1]), start=start, num_bytes=num_rows * row_bytes)
        part = GgufTensor(kind=tensor.kind, shape=(num_rows, columns), entry=one)
        yield _entry(part, pattern.replace("*", str(idx)))


def _entry(tensor: GgufTensor, name: str) -> TensorEntry | QuantEntry:
    codes = replace(tensor.entry, name=name)
    if tensor.kind is None:
        return codes
    kind = next(known for known in BLOCK_KINDS if known == tensor.kind)
    form = QuantFormat(kind=kind, group=BLOCK_KINDS[kind].num_columns, scale_dtype="U8")
    return QuantEntry(name=name, shape=tensor.shape, format=form, codes=codes, scales=None)


def _joined(
    apart: Mapping[tuple[int, str], GgufTensor], architecture: Architecture, config: Mapping[str, Any]
) -> Iterator[StoredTensor]:
    """The tensors that are stored in parts."""
    for names, (target, join) in architecture.joins.items():
        for layer in sorted({layer for layer, name in apart if name in names}):
            missing = [name for name in names if (layer, name) not in apart]
            if missing:
                raise CheckpointError(
                    f"the GGUF file has tensors of layer {layer} without blk.{layer}.{missing[0]}; it is not the whole "
                    "model"
                )
            sources = tuple(_entry(apart[layer, name], apart[layer, name].entry.name) for name in names)
            yield join(f"{architecture.layer}{layer}.{target}", sources, config)


def _unknown(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the GGUF file has a tensor {name!r}, which models of its architecture are not known to have; use the "
        "safetensors version of the model"
    )
