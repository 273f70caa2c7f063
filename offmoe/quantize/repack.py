"""A GPTQ or AWQ checkpoint written anew as compressed-tensors' `pack-quantized`, once, with the same values.

Both published forms store a matrix turned, inputs by outputs, which no kernel here reads; so they are repacked before
they are served. A few matrices are in memory at a time: the next is read while one is repacked and another one written.
What is not quantised is copied as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offmoe.checkpoint.background import Stages
from offmoe.checkpoint.copies import copied, small_files, source_identity
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.json_file import read_json
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.checkpoint.writer import CONFIG_NAME, CheckpointWriter, PlannedShard, PlannedTensor
from offmoe.core.errors import CheckpointError, UnsupportedModelError
from offmoe.core.progress import Progress
from offmoe.formats.dense import writable_bytes
from offmoe.formats.repack import WORD_BITS, Packing, Repacked, repack
from offmoe.hf.stored import read_tensor

SHARD_BYTES = 2 << 30
METHODS = ("gptq", "awq")
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Scheme in the config.json of a GPTQ or AWQ checkpoint."""

    packing: Packing
    bits: int
    group: int
    symmetric: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RepackResult:
    """Sizes are bytes of all tensors; `resumed` counts files that a run before had written."""

    source_bytes: int
    written_bytes: int
    num_matrices: int
    bits: int
    num_shards: int
    resumed: int


def find_scheme(config: dict[str, Any]) -> Scheme | None:
    """None where config.json names neither GPTQ nor AWQ. Raises UnsupportedModelError for a kind that is not read."""
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") not in METHODS:
        return None
    method, bits = found["quant_method"], found.get("bits", found.get("w_bit", 4))
    group = found.get("group_size", found.get("q_group_size", 128))
    if type(group) is not int or type(bits) is not int or (group < 1 and group != -1):
        raise CheckpointError(f"config.json says {bits!r} bits in groups of {group!r}; whole numbers are needed")
    packing: Packing = "awq" if method == "awq" else "gptq"
    if method == "awq":
        version = str(found.get("version", "gemm")).lower()
        if version != "gemm" or bits != 4:
            raise UnsupportedModelError(f"the checkpoint is AWQ of {bits} bits, version {version!r} (known: 4, gemm)")
    else:
        form = found.get("checkpoint_format", "gptq")
        if form not in ("gptq", "gptq_v2") or bits not in (4, 8):
            raise UnsupportedModelError(
                f"the checkpoint is GPTQ of {bits} bits, format {form!r} (known: 4 or 8 bits; gptq, gptq_v2)"
            )
        packing = form
    symmetric = bool(found.get("sym", False)) if method == "gptq" else not found.get("zero_point", True)
    return Scheme(packing=packing, bits=bits, group=group, symmetric=symmetric)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """One linear layer: the names of its parts in the source, and the shape of what it is."""

    base: str
    parts: dict[str, TensorEntry]
    shape: tuple[int, int]
    scheme: Scheme

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.parts.values())

    @property
    def written(self) -> tuple[PlannedTensor, ...]:
        """Side by side, in the order of their bytes."""
        rows, width = self.shape
        per_word, groups = WORD_BITS // self.scheme.bits, self.parts["scales"].shape[0]
        tensors = [
            PlannedTensor(name=f"{self.base}.weight_shape", dtype="I64", shape=(2,)),
            PlannedTensor(name=f"{self.base}.weight_packed", dtype="I32", shape=(rows, width // per_word)),
            PlannedTensor(name=f"{self.base}.weight_scale", dtype=self.parts["scales"].dtype, shape=(rows, groups)),
        ]
        if not self.scheme.symmetric:
            shape = (-(-rows // per_word), groups)
            tensors.append(PlannedTensor(name=f"{self.base}.weight_zero_point", dtype="I32", shape=shape))
        return tuple(tensors)

    def repacked(self, parts: dict[str, torch.Tensor]) -> Repacked:
        return repack(
            self.scheme.packing, self.scheme.bits, parts["qweight"], parts["scales"], parts.get("qzeros"),
            parts.get("g_idx"), symmetric=self.scheme.symmetric, name=self.base,
        )  # fmt: skip


def repack_checkpoint(source: Path, target: Path, scheme: Scheme, progress: Progress) -> RepackResult:
    """Write `source` to `target`, or go on with a run that was cut off. `target` was looked at before.

    `progress("repacking", done_bytes, total_bytes)` counts bytes of the source. Raises as `repack`, and OutputError.
    """
    with ExitStack() as opened:
        index = CheckpointIndex.open(source)
        opened.callback(index.close)
        shards = list(_shards(_items(index, scheme)))
        planned = [PlannedShard(tensors=tuple(t for item in shard for t in _written(item))) for shard in shards]
        writer = CheckpointWriter(target, planned, {"source": source_identity(index), "repack": 1})
        writer.begin()
        finished = [idx for idx in range(len(shards)) if writer.is_finished(idx)]
        total = sum(item.num_bytes for idx, shard in enumerate(shards) if idx not in finished for item in shard)
        done = 0

        def count(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress("repacking", done, total)

        for idx, shard in enumerate(shards):
            if idx not in finished:
                begin = writer.num_written(idx)
                with closing(_bytes_of(shard, index, count, begin)) as data:
                    writer.write(idx, data, begin=begin)
        raw = read_json(source / CONFIG_NAME)
        writer.finish({**raw, "quantization_config": _config(shards, scheme)}, small_files(source))
        matrices = sum(isinstance(item, _Matrix) for shard in shards for item in shard)
        return RepackResult(
            source_bytes=index.num_bytes, written_bytes=sum(shard.num_bytes for shard in planned),
            num_matrices=matrices, bits=scheme.bits, num_shards=len(shards), resumed=len(finished),
        )  # fmt: skip


_Item = TensorEntry | _Matrix


def _items(index: CheckpointIndex, scheme: Scheme) -> Iterator[_Item]:
    """Every tensor that stays and every matrix, in the order of their names: an expert's matrices side by side."""
    bases = {name.removesuffix(".qweight") for name in index.stored if name.endswith(".qweight")}
    if not bases:
        raise CheckpointError(
            f"config.json says that the checkpoint is quantised ({scheme.packing}), but none of its "
            f"{len(index.stored)} tensors is; config and tensors are of different models"
        )
    for name, entry in index.stored.items():
        base, _, part = name.rpartition(".")
        if base not in bases or part not in _PARTS:
            yield entry
        elif part == "qweight":
            yield _matrix(base, index, scheme)


def _matrix(base: str, index: CheckpointIndex, scheme: Scheme) -> _Matrix:
    parts = {part: index.stored[f"{base}.{part}"] for part in _PARTS if f"{base}.{part}" in index.stored}
    needed = ("scales",) if scheme.symmetric else ("scales", "qzeros")
    missing = [part for part in needed if part not in parts]
    if missing:
        raise CheckpointError(f"{base}.qweight has no {missing[0]}; download the checkpoint again")
    words, per_word = parts["qweight"], WORD_BITS // scheme.bits
    if words.dtype != "I32" or len(words.shape) != 2 or parts["scales"].dtype not in ("F16", "BF16", "F32"):
        raise CheckpointError(
            f"{base}.qweight is {words.dtype} {list(words.shape)}, its scales are {parts['scales'].dtype}; 32-bit "
            "words in two dimensions and floating point scales are needed: download the checkpoint again"
        )
    rows, columns = words.shape
    shape = (columns * per_word, rows) if scheme.packing == "awq" else (columns, rows * per_word)
    groups = 1 if scheme.group == -1 else shape[1] // scheme.group
    if parts["scales"].shape != (groups, shape[0]):
        raise CheckpointError(
            f"config.json says groups of {scheme.group}, {base}.scales is {list(parts['scales'].shape)} for "
            f"{shape[1]} inputs and {shape[0]} outputs; config and tensors are of different models"
        )
    return _Matrix(base=base, parts=parts, shape=shape, scheme=scheme)


def _shards(items: Iterator[_Item]) -> Iterator[list[_Item]]:
    shard: list[_Item] = []
    size = 0
    for item in items:
        num_bytes = sum(tensor.num_bytes for tensor in _written(item))
        if shard and size + num_bytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += num_bytes
    yield shard


def _written(item: _Item) -> tuple[PlannedTensor, ...]:
    if isinstance(item, _Matrix):
        return item.written
    return (PlannedTensor(name=item.name, dtype=item.dtype, shape=item.shape),)


# Matrices and pieces that are read and not repacked yet, and tensors that are repacked and not written.
_READ_AHEAD, _REPACKED_AHEAD = 2, 8


def _bytes_of(
    shard: list[_Item], index: CheckpointIndex, count: Callable[[int], None], skip: int
) -> Generator[bytes | memoryview, None, None]:
    """The bytes of a shard's tensors from byte `skip`. Items before that are not read."""
    stages: Stages[_Item] = Stages(
        written_bytes=lambda item: sum(part.num_bytes for part in _written(item)),
        read=lambda items: _read(items, index), encode=_repacked, depths=(_READ_AHEAD, _REPACKED_AHEAD),
    )  # fmt: skip
    return stages.run(shard, skip, count)


_Source = tuple[_Matrix, dict[str, torch.Tensor]] | memoryview


def _read(items: Sequence[_Item], index: CheckpointIndex) -> Iterator[_Source]:
    for item in items:
        if isinstance(item, TensorEntry):
            yield from copied(item, index)
        else:
            yield item, {name: read_tensor(index, entry) for name, entry in item.parts.items()}


def _repacked(pieces: Iterator[_Source]) -> Iterator[tuple[bytes | memoryview, int]]:
    """Pieces of the result, each with the bytes of the source that it stands for."""
    for piece in pieces:
        if isinstance(piece, memoryview):
            yield piece, len(piece)
            continue
        matrix, parts = piece
        found = matrix.repacked(parts)
        yield b"".join(size.to_bytes(8, "little") for size in matrix.shape), 0
        yield writable_bytes(found.codes), matrix.num_bytes
        for tensor in (found.scales, found.zeros):
            if tensor is not None:
                yield writable_bytes(tensor), 0


def _config(shards: list[list[_Item]], scheme: Scheme) -> dict[str, Any]:
    """The entry of config.json for compressed-tensors: weights only, and which linear layers stay."""
    kept = sorted(
        item.name.removesuffix(".weight")
        for shard in shards
        for item in shard
        if isinstance(item, TensorEntry) and item.name.endswith(".weight") and len(item.shape) == 2
    )
    weights: dict[str, Any] = {
        "num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False,
        "strategy": "channel" if scheme.group == -1 else "group",
        "group_size": None if scheme.group == -1 else scheme.group,
    }  # fmt: skip
    group = {
        "targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None,
        "format": "pack-quantized",
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": kept, "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip
