"""Safetensors headers, read as hostile input. Knows names, types, shapes and byte ranges; never reads a tensor.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data. Source:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any, BinaryIO

from offmoe.checkpoint.tensor_entry import ITEM_BITS, TensorEntry
from offmoe.core.errors import CheckpointError

# The format's own limit (100 MB) keeps a lying length from being allocated.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how the text begins that a clone without LFS has
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 8
MAX_SIZE = 1 << 63


def read_header(file: BinaryIO, *, file_name: str, file_bytes: int, file_idx: int) -> dict[str, TensorEntry]:
    """Validated entries of one shard, by tensor name; byte ranges are absolute in the file.

    Raises CheckpointError naming the file, for a short file, a header that is no JSON object, unknown types, shapes
    that do not match the byte range, ranges outside the file, and ranges that overlap.
    """
    header, data_start = _load_json(file, file_name, file_bytes)
    entries = {}
    for name, fields in header.items():
        if name != "__metadata__":
            entries[name] = _entry(name, fields, file_name, data_start, file_bytes, file_idx)
    _refuse_overlaps(entries, file_name)
    return entries


def _load_json(file: BinaryIO, file_name: str, file_bytes: int) -> tuple[dict[str, Any], int]:
    file.seek(0)
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(
            f"{file_name} has {file_bytes} bytes, too few for a safetensors header; download it again"
        )
    if prefix == LFS_POINTER[:8]:
        raise CheckpointError(
            f"{file_name} is a Git LFS pointer of {file_bytes} bytes in place of the weights; run `git lfs pull` in "
            "the folder, or download the model with `hf download`"
        )
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise CheckpointError(
            f"{file_name}: the header claims {header_bytes} bytes, the file has {file_bytes}; "
            "it is truncated or not safetensors: download it again"
        )
    raw = file.read(header_bytes)
    if len(raw) != header_bytes:
        raise CheckpointError(
            f"{file_name} ends inside its header ({len(raw)} of {header_bytes} bytes); download it again"
        )
    try:
        header = json.loads(raw, object_pairs_hook=lambda pairs: _no_duplicates(pairs, file_name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file_name}: the header is not valid JSON ({error}); download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file_name}: the header is a JSON {type(header).__name__}, not an object; download it again"
        )
    return header, 8 + header_bytes


def _no_duplicates(pairs: list[tuple[str, Any]], file_name: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise CheckpointError(f"{file_name}: the header names a tensor twice; download it again")
    return result


def _entry(name: str, fields: Any, file_name: str, data_start: int, file_bytes: int, file_idx: int) -> TensorEntry:
    where = f"{file_name}: tensor {_shown(name)}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise CheckpointError(f"{where} lacks dtype, shape or data_offsets; download the file again")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise CheckpointError(f"{where} has the unknown type {_shown(dtype)}; known: {', '.join(ITEM_BITS)}")
    if not _is_size_list(shape) or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{where} has the shape {_shown(shape)}; expected at most {MAX_DIMS} sizes >= 0")
    if not _is_size_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the byte range {_shown(offsets)}; expected [start, end] with start <= end")
    need_bits, have_bits = math.prod(shape) * ITEM_BITS[dtype], 8 * (offsets[1] - offsets[0])
    if need_bits != have_bits:
        raise CheckpointError(
            f"{where}: {dtype} {shape} needs {need_bits} bits, its byte range has {have_bits}; download the file again"
        )
    if data_start + offsets[1] > file_bytes:
        raise CheckpointError(
            f"{where} ends at byte {data_start + offsets[1]}, the file has {file_bytes}; "
            "it is truncated: download it again"
        )
    return TensorEntry(
        name=name, dtype=dtype, shape=tuple(shape), file_idx=file_idx,
        start=data_start + offsets[0], num_bytes=offsets[1] - offsets[0],
    )  # fmt: skip


def _is_size_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < MAX_SIZE for item in value)


def _shown(value: Any) -> str:
    """`value` as an error message shows it: a hostile header may hold megabytes, nested a thousand deep."""
    short = reprlib.Repr()
    short.maxstring = 200
    return short.repr(value)


def _refuse_overlaps(entries: dict[str, TensorEntry], file_name: str) -> None:
    end, last = 0, ""
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.num_bytes)):
        if entry.num_bytes and entry.start < end:
            raise CheckpointError(
                f"{file_name}: tensors {_shown(last)} and {_shown(entry.name)} overlap; download the file again"
            )
        if entry.num_bytes:
            end, last = entry.start + entry.num_bytes, entry.name
