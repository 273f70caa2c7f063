"""Bits that bfloat16 experts of a checkpoint would take packed: counted on rows of its first experts. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offmoe.checkpoint.derived import StoredTensor
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.formats.packed_sizes import ESCAPE_BYTES, HEAD_BYTES, row_bytes

# Matrices that are looked at, and bytes of each.
NUM_MATRICES, SAMPLE_BYTES = 6, 1 << 17
_NEIGHBOURS = 15


@dataclass(frozen=True, kw_only=True)
class PackedSample:
    """`bits` a weight, escapes and heads counted; `escape_share` of the weights; `num_weights` that were looked at."""

    bits: float
    escape_share: float
    num_weights: int


def sample_packed(
    files: Sequence[Path], per_expert: Sequence[tuple[str, int, StoredTensor]],
    stacked: Sequence[tuple[StoredTensor, int]],
) -> PackedSample | None:  # fmt: skip
    """None where experts are not plain bfloat16, and where their bytes are not there but headers alone."""
    entries = [entry for _, _, entry in per_expert[:NUM_MATRICES]] + [entry for entry, _ in stacked[:NUM_MATRICES]]
    if not all(isinstance(entry, TensorEntry) and entry.dtype == "BF16" for entry in entries):
        return None
    weights = escapes = num_bytes = 0
    for data, columns in _rows(files, [entry for entry in entries if isinstance(entry, TensorEntry)]):
        if not any(data):
            continue
        found, size = count_escapes(data, columns), len(data) // 2
        weights, escapes = weights + size, escapes + found
        num_bytes += size // columns * (row_bytes(columns) + HEAD_BYTES) + found * ESCAPE_BYTES
    if not weights:
        return None
    return PackedSample(bits=8 * num_bytes / weights, escape_share=escapes / weights, num_weights=weights)


def count_escapes(numbers: bytes, columns: int) -> int:
    """Escapes of rows of bfloat16 numbers, with the exponents that suit each row best."""
    escapes = 0
    for begin in range(0, len(numbers), 2 * columns):
        row = numbers[begin : begin + 2 * columns]
        pairs = Counter(zip(row[1::2], row[::2], strict=True))
        counts = [0] * 256
        for (upper, lower), count in pairs.items():
            counts[(upper & 127) << 1 | lower >> 7] += count
        inside, first = max((sum(counts[at : at + _NEIGHBOURS]), -at) for at in range(257 - _NEIGHBOURS))
        others = counts[:-first] + counts[_NEIGHBOURS - first :]
        escapes += columns - inside - max(others)
    return escapes


def _rows(files: Sequence[Path], entries: Sequence[TensorEntry]) -> Iterator[tuple[bytes, int]]:
    """The first rows of each tensor and their columns."""
    for entry in entries:
        columns = entry.shape[-1]
        num_rows = min(entry.num_bytes // (2 * columns), max(1, SAMPLE_BYTES // (2 * columns)))
        with files[entry.file_idx].open("rb") as file:
            file.seek(entry.start)
            data = file.read(2 * num_rows * columns)
        if len(data) == 2 * num_rows * columns:
            yield data, columns
