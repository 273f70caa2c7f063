"""Sizes of packed matrices, and their places in a slot, one after the other. No torch: for plans, too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PIECE_COLUMNS, CHUNK_PIECES, PIECE_BYTES = 32, 4, 48
HEAD_BYTES, ESCAPE_BYTES = 8, 4
# Numbers for each of which there is room for an escape. Of trained weights one in 2,000 is one, or fewer.
NUMBERS_AN_ESCAPE, LEAST_ESCAPES = 512, 64
# Columns that an escape can name.
MOST_COLUMNS = 1 << 23
ALIGN_BYTES = 64
# Resident weights that are read before any of them is packed, and memory of the threads that pack.
BATCH_BYTES, SCRATCH_BYTES = 256 << 20, 16 << 20
# Smaller resident matrices are read from the processor's caches, and are not packed.
LEAST_NUMBERS = 1 << 18
# A packed slot of more of a plain one's bytes is not worth it: experts so small that heads and tables are most of them.
WORTH_IT = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPlace:
    """One packed matrix in a slot: where its parts begin, in bytes, and the sizes that say how long they are."""

    rows: int
    columns: int
    counter_at: int
    codes_at: int
    heads_at: int
    escapes_at: int
    most_escapes: int


def row_bytes(columns: int) -> int:
    """Bytes of a packed row, without its head and its escapes."""
    return -(-columns // PIECE_COLUMNS) * PIECE_BYTES


def packed_slot(shapes: Iterable[tuple[int, int]], plain_bytes: int) -> int:
    """Bytes of a slot for matrices of these shapes, two of which hold them as they are stored in `plain_bytes`."""
    need = max(place_matrices(shapes)[1], -(-plain_bytes // 2))
    return _aligned(need)


def loading_bytes(resident_bytes: int, plain_bytes: int, largest_bytes: int) -> int:
    """The most that is there while resident weights are packed as they are read, a batch or the largest at a time.

    `resident_bytes` in the end, `plain_bytes` as they are stored.
    """
    return resident_bytes + min(plain_bytes, max(BATCH_BYTES, largest_bytes)) // 4 + SCRATCH_BYTES


def most_escapes(rows: int, columns: int) -> int:
    """Escapes that a matrix has room for."""
    return max(LEAST_ESCAPES, rows * columns // NUMBERS_AN_ESCAPE)


def place_matrices(shapes: Iterable[tuple[int, int]]) -> tuple[tuple[PackedPlace, ...], int]:
    """Places of matrices of these shapes one after the other, and the bytes of a slot that holds them all."""
    shapes = list(shapes)
    end = _aligned(4 * len(shapes))
    places = []
    for number, (rows, columns) in enumerate(shapes):
        room = most_escapes(rows, columns)
        heads_at = end + _aligned(rows * row_bytes(columns))
        escapes_at = heads_at + _aligned(rows * HEAD_BYTES)
        places.append(
            PackedPlace(
                rows=rows, columns=columns, counter_at=4 * number, codes_at=end, heads_at=heads_at,
                escapes_at=escapes_at, most_escapes=room,
            )
        )  # fmt: skip
        end = escapes_at + _aligned(room * ESCAPE_BYTES)
    return tuple(places), end


def packed_bytes(shapes: Iterable[tuple[int, int]]) -> int:
    """Bytes that matrices of these shapes take together."""
    return place_matrices(shapes)[1]


def _aligned(num_bytes: int) -> int:
    return num_bytes + -num_bytes % ALIGN_BYTES
