"""Bfloat16 in 12 bits, without loss: the form of a packed matrix, and its values in plain torch.

docs/formats.md has the form bit by bit. N rows (outputs) of K columns:

codes    U8 (N, R), R = 48 * ceil(K / 32): of each 128 columns the bytes of sign and mantissa, then the indices of
         exponents, half a byte each. The last chunk of a row may be shorter
heads    U8 (N, 8): where the row's escapes begin (U32), how many they are (U16), the first of its fifteen neighbouring
         exponents, its sixteenth exponent
escapes  I32 (C, 1): the column times 256, and an exponent

A `QuantMatrix` of kind "packed" has heads as its scales and escapes as its zeros.
"""

from __future__ import annotations

import torch

from offmoe.formats.packed_sizes import CHUNK_PIECES, MOST_COLUMNS, PIECE_BYTES, PIECE_COLUMNS

# Within a piece, the place of each column (`packed_place` in isa/generic/packed.h).
_PLACES = tuple(
    column // 16 * 8 + column % 8 // 4 * 16 + column % 4 * 2 + column // 8 % 2 for column in range(PIECE_COLUMNS)
)


def packed_values(codes: torch.Tensor, heads: torch.Tensor, escapes: torch.Tensor, columns: int) -> torch.Tensor:
    """Rows as bfloat16, (rows of `codes` and `heads`, K), bit for bit as they were before they were packed."""
    num_rows = len(codes)
    numbers, indices = _planes(codes, columns)
    heads = heads.contiguous()
    table = torch.cat([heads[:, 6:7].int() + torch.arange(15, dtype=torch.int32), heads[:, 7:8].int()], 1)
    exponents = table.gather(1, indices.flatten(1).long()).view(indices.shape)
    numbers = numbers.int()
    placed = (numbers & 128) << 8 | exponents << 7 | numbers & 127
    words = placed[:, :, list(_PLACES)].flatten(1)[:, :columns].contiguous()
    fields = heads.view(torch.int32)
    counts = fields[:, 1].long() & 0xFFFF
    if int(counts.sum()):
        rows = torch.arange(num_rows).repeat_interleave(counts)
        within = torch.arange(len(rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        found = escapes.flatten()[fields[:, 0].long()[rows] + within]
        at = found >> 8 & (MOST_COLUMNS - 1)
        words[rows, at.long()] = words[rows, at.long()] & 0x807F | (found & 255) << 7
    signed = torch.where(words >= 1 << 15, words - (1 << 16), words)
    return signed.to(torch.int16).view(torch.bfloat16)


def _planes(codes: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of sign and mantissa, and the indices, of each piece in the order of places: (R, pieces, 32) both."""
    num_pieces, num_rows = -(-columns // PIECE_COLUMNS), len(codes)
    whole, rest = divmod(num_pieces, CHUNK_PIECES)
    chunk_bytes = CHUNK_PIECES * PIECE_BYTES
    parts = []
    for begin, chunks, pieces in ((0, whole, CHUNK_PIECES), (whole * chunk_bytes, 1, rest)):
        if not chunks or not pieces:
            continue
        cut = codes[:, begin : begin + chunks * pieces * PIECE_BYTES].reshape(num_rows, chunks, pieces * PIECE_BYTES)
        split = pieces * PIECE_COLUMNS
        halves = cut[:, :, split:].reshape(num_rows, chunks * pieces, PIECE_COLUMNS // 2)
        parts.append((cut[:, :, :split].reshape(num_rows, -1, PIECE_COLUMNS), torch.cat([halves & 15, halves >> 4], 2)))
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)
