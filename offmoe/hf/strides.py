"""Layout of an expert's matrix in published tensors: strided views of them, joined. Plain arithmetic on offsets."""

from __future__ import annotations

from dataclasses import dataclass

from offmoe.core.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class StridedPiece:
    """A strided 2-D view of one source (offset and strides in elements)."""

    source: str
    offset: int
    shape: tuple[int, int]
    strides: tuple[int, int]


@dataclass(frozen=True, slots=True)
class StridedMatrix:
    """Pieces joined along `axis` (0 rows, 1 columns): what an expert's slice of the parameter is made of."""

    pieces: tuple[StridedPiece, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape after joining."""
        size = sum(piece.shape[self.axis] for piece in self.pieces)
        other = self.pieces[0].shape[1 - self.axis]
        return (size, other) if self.axis == 0 else (other, size)


def concatenate(matrices: list[StridedMatrix], axis: int, where: str) -> StridedMatrix:
    """One after another along `axis`. Raises UnsupportedModelError where one was joined along the other axis."""
    if len(matrices) == 1:
        return matrices[0]
    pieces: list[StridedPiece] = []
    for matrix in matrices:
        if len(matrix.pieces) > 1 and matrix.axis != axis:
            raise UnsupportedModelError(f"{where}: parts joined along two axes; please report this model")
        pieces.extend(matrix.pieces)
    return StridedMatrix(tuple(pieces), axis)


def transpose(matrix: StridedMatrix) -> StridedMatrix:
    """Rows become columns: other strides."""
    pieces = tuple(StridedPiece(p.source, p.offset, p.shape[::-1], p.strides[::-1]) for p in matrix.pieces)
    return StridedMatrix(pieces, 1 - matrix.axis)


def deinterleave(matrix: StridedMatrix, axis: int, where: str) -> StridedMatrix:
    """[a0, b0, a1, b1, ...] along `axis` becomes [a0, a1, ..., b0, b1, ...]: two views of doubled stride.

    Raises UnsupportedModelError for what has several pieces.
    """
    if len(matrix.pieces) != 1:
        raise UnsupportedModelError(f"{where}: interleaving of merged parts is not read yet; please report this model")
    piece = matrix.pieces[0]
    shape, strides, step = list(piece.shape), list(piece.strides), piece.strides[axis]
    shape[axis], strides[axis] = shape[axis] // 2, 2 * step
    halves = tuple(
        StridedPiece(piece.source, piece.offset + half * step, (shape[0], shape[1]), (strides[0], strides[1]))
        for half in range(2)
    )
    return StridedMatrix(halves, axis)
