"""Bits that bfloat16 experts of a checkpoint would take packed: counted on rows of its first experts. numpy alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offmoe.checkpoint.derived import StoredTensor
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.formats.packed_sizes import ESCAPE_BYTES, HEAD_BYTES, row_bytes

# Matrices that are looked at, and bytes of each.
NUM_MATRICES, SAMPLE_BYTES = 6, 1 << 20
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
    for rows in _rows(files, [entry for entry in entries if isinstance(entry, TensorEntry)]):
        if not rows.any():
            continue
        found = count_escapes(rows)
        weights, escapes = weights + rows.size, escapes + found
        num_bytes += len(rows) * (row_bytes(rows.shape[1]) + HEAD_BYTES) + found * ESCAPE_BYTES
    if not weights:
        return None
    return PackedSample(bits=8 * num_bytes / weights, escape_share=escapes / weights, num_weights=weights)


def count_escapes(rows_NK: np.ndarray) -> int:
    """Escapes of rows of bfloat16 numbers (U16), with the exponents that suit each row best."""
    exponents = (rows_NK >> 7 & 255).astype(np.intp)
    num_rows = len(exponents)
    counts = np.zeros((num_rows, 256), dtype=np.int64)
    np.add.at(counts, (np.arange(num_rows)[:, None], exponents), 1)
    sums = np.concatenate([np.zeros((num_rows, 1), dtype=np.int64), counts.cumsum(1)], axis=1)
    windows = sums[:, _NEIGHBOURS:] - sums[:, :-_NEIGHBOURS]  # numbers in the fifteen exponents from each one on
    begin = windows.argmax(1)
    outside = counts.copy()
    for exponent in range(_NEIGHBOURS):
        outside[np.arange(num_rows), begin + exponent] = 0
    return int(rows_NK.size - windows.max(1).sum() - outside.max(1).sum())


def _rows(files: Sequence[Path], entries: Sequence[TensorEntry]) -> Iterator[np.ndarray]:
    """The first rows of each tensor, (rows, columns) U16."""
    for entry in entries:
        columns = entry.shape[-1]
        num_rows = min(entry.num_bytes // (2 * columns), max(1, SAMPLE_BYTES // (2 * columns)))
        with files[entry.file_idx].open("rb") as file:
            file.seek(entry.start)
            data = file.read(2 * num_rows * columns)
        if len(data) == 2 * num_rows * columns:
            yield np.frombuffer(data, dtype="<u2").reshape(num_rows, columns)
