"""Geometry of kernels: a layer's matrices in a slot, blocks in which they are computed, rows in tiles. No Triton.

Shapes: N rows (token, expert), M tiles of B rows, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from offmoe.checkpoint.expert_index import ExpertPart, MoeLayer, QuantPart
from offmoe.formats.dense import torch_dtype
from offmoe.formats.layout import LayerLayout
from offmoe.kernels.activations import Activation
from offmoe.kernels.codes import SPAN_WORDS, Blocks, Codes, codes_of, first_word

HALVES, TURNS = 1, 2
# Rows of a tile: 16 is the least that tensor cores take.
TILE_ROWS = (16, 64, 128)
# Tiles that run side by side, block by block, so that an expert's tiles read its weights from L2 after the first, and
# their inputs, 8 tiles of 128 rows of 4096 bfloat16, fit there too.
TILES_TOGETHER = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotMatrix:
    """One launch's weights, in elements: see triton_experts. `num_out` counts the outputs after pairing.

    With `codes` the elements are words of 32 bits, of GGUF's blocks bytes, and `in_stride` is 1.
    """

    num_in: int
    num_out: int
    base: int
    out_stride: int
    in_stride: int
    pairs: int = 0
    pair_stride: int = 0
    out_begin: int = 0
    out_width: int = 0
    codes: Codes | Blocks | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Block sizes. Elements are the weights that one program of a row kernel holds at once.

    4096 in 4 warps: 32 a thread, 4 loads of 16 bytes in flight; some 1500 programs for 8 rows of 2 x 768 x 2048. Where
    outputs lie contiguous, a block of `column_outputs` is whole sectors of memory and still leaves enough programs.
    Words of codes: as many bytes a thread, in fewer threads, since four rows in a lane share the inputs it converts.
    `has_tiles`: the device multiplies tiles in units of its own.
    """

    row_elements: int = 4096
    row_inputs: int = 512
    row_warps: int = 4
    sum_elements: int = 8192
    sum_inputs: int = 256
    sum_warps: int = 8
    column_outputs: int = 32
    row_words: int = 1024
    row_words_in: int = 64
    row_words_warps: int = 2
    sum_words: int = 2048
    sum_words_in: int = 32
    sum_words_warps: int = 4
    stages: int = 1
    shared_bytes: int = 48 * 1024
    has_tiles: bool = True

    def row_blocks(self, matrix: SlotMatrix) -> dict[str, int]:
        """Blocks of a program that computes one row."""
        if matrix.codes is not None:
            words = self.row_words // (2 if matrix.pairs else 1)
            blocks = _word_blocks(matrix, matrix.codes, words, self.row_words_in)
            return {**blocks, **self._row_options(self.row_words_warps)}
        elements = self.row_elements // (2 if matrix.pairs else 1)
        return {**_blocks(matrix, elements, self.row_inputs, self.column_outputs), **self._row_options(self.row_warps)}

    def sum_blocks(self, matrix: SlotMatrix, block_k: int) -> dict[str, int]:
        """Blocks of a program that computes a token's `block_k` rows."""
        if matrix.codes is not None:
            blocks = _word_blocks(matrix, matrix.codes, self.sum_words // block_k, self.sum_words_in)
            return {**blocks, **self._row_options(self.sum_words_warps)}
        elements = self.sum_elements // block_k
        blocks = _blocks(matrix, elements, self.sum_inputs, self.column_outputs // 2)
        return {**blocks, **self._row_options(self.sum_warps)}

    def _row_options(self, num_warps: int) -> dict[str, int]:
        return {"STAGES": self.stages, "num_warps": num_warps, "enable_fp_fusion": True}

    def tile_blocks(self, matrix: SlotMatrix, block_rows: int, itemsize: int) -> dict[str, int]:
        """Blocks, warps and stages of a tile, as many stages as the shared memory holds."""
        outputs = 64 if block_rows == TILE_ROWS[0] else 128
        block_in = max(16, 128 // itemsize)
        stage_bytes, free_bytes = (block_rows + outputs) * block_in * itemsize, self.shared_bytes
        if matrix.codes is not None:  # the values, and what is copied ahead of them: words and inputs
            free_bytes -= outputs * block_in * itemsize
            stage_bytes = block_rows * block_in * itemsize + outputs * block_in * matrix.codes.bits // 8
        return {
            "BLOCK_ROWS": block_rows,
            "BLOCK_OUT": outputs // (2 if matrix.pairs else 1),
            "BLOCK_IN": block_in,
            "num_warps": 8 if block_rows > 64 else 4,
            "num_stages": max(1, min(4, free_bytes // stage_bytes)),
            "enable_fp_fusion": True,
        }


def _blocks(matrix: SlotMatrix, elements: int, inputs: int, column_outputs: int) -> dict[str, int]:
    """Outputs and inputs of a block: long along the dimension that lies contiguous."""
    elements = max(1, elements)
    if matrix.in_stride == 1 or matrix.out_stride != 1:
        block_in = min(inputs, power_of_two(matrix.num_in), elements)
        return {"BLOCK_OUT": min(elements // block_in, power_of_two(matrix.num_out)), "BLOCK_IN": block_in}
    block_out = min(column_outputs, power_of_two(matrix.num_out), elements)
    return {"BLOCK_OUT": block_out, "BLOCK_IN": min(elements // block_out, power_of_two(matrix.num_in))}


def _word_blocks(matrix: SlotMatrix, codes: Codes | Blocks, words: int, words_in: int) -> dict[str, int]:
    """Outputs and inputs of a block of `words` words of codes, `words_in` of a row; whole spans."""
    block_in = min(words_in, max(SPAN_WORDS, power_of_two(-(-matrix.num_in // codes.codes_a_word))))
    outputs = max(1, min(words // block_in, power_of_two(matrix.num_out)))
    return {"BLOCK_OUT": outputs, "BLOCK_IN": block_in * codes.codes_a_word}


def power_of_two(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def row_by_row(num_tokens: int, num_rows: int, num_experts: int) -> bool:
    """Whether so few rows of so many experts hardly ever share one. One token's never do."""
    return num_tokens == 1 or 2 * num_rows <= num_experts


def rows_a_tile(num_rows: int, num_experts: int) -> int:
    """The least tile that holds an expert's mean share of the rows."""
    mean = num_rows / min(num_rows, num_experts)
    return next((rows for rows in TILE_ROWS if mean <= rows), TILE_ROWS[-1])


def make_tiles(slot_N: torch.Tensor, block_rows: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows cut into tiles of one slot each: tile_slot_M and tile_row_MB (-1: none), on the device of `slot_N`.

    M, a multiple of TILES_TOGETHER, depends on shapes alone (the last tiles are empty): nothing waits for the device.
    """
    num_rows, device = slot_N.numel(), slot_N.device
    num_tiles = num_rows // block_rows + min(num_rows, num_experts + 1)
    num_tiles += -num_tiles % TILES_TOGETHER
    sorted_N, order_N = torch.sort(slot_N, stable=True)
    position_N = torch.arange(num_rows, device=device)
    rank_N = position_N - torch.searchsorted(sorted_N, sorted_N)
    tile_N = torch.cumsum(rank_N % block_rows == 0, 0) - 1
    tile_row_MB = torch.full((num_tiles, block_rows), -1, dtype=torch.int32, device=device)
    tile_row_MB[tile_N, rank_N % block_rows] = order_N.int()
    tile_slot_M = torch.full((num_tiles,), -1, dtype=torch.int32, device=device)
    tile_slot_M[tile_N] = sorted_N.int()
    return tile_slot_M, tile_row_MB


def up_matrices(layer: MoeLayer, layout: LayerLayout, activation: Activation | None) -> tuple[list[SlotMatrix], bool]:
    """The launches of the up projection, and whether the activation is in them."""
    parts = [_matrix(layer, layout, part) for part in layer.up]
    if activation is None or (not activation.gated and len(parts) > 1):
        return _side_by_side(parts), False
    first, rest = parts[0], parts[1:]
    if not activation.gated:
        return _side_by_side(parts), True
    width_F = sum(part.num_out for part in parts) // 2
    if activation.interleaved and not rest:
        paired = replace(first, pairs=TURNS, pair_stride=first.out_stride, codes=_apart(first.codes, 1))
    elif not activation.interleaved and not rest:
        codes = _apart(first.codes, width_F)
        paired = replace(first, pairs=HALVES, pair_stride=width_F * first.out_stride, codes=codes)
    elif not activation.interleaved and len(rest) == 1 and _alike(first, rest[0]):
        paired = _pair_of(first, rest[0])
    else:
        return _side_by_side(parts), False
    return [replace(paired, num_out=width_F, out_width=width_F)], True


def down_matrices(layer: MoeLayer, layout: LayerLayout) -> list[SlotMatrix]:
    """The launches of the down projection."""
    return _side_by_side([_matrix(layer, layout, part) for part in layer.down])


def _matrix(layer: MoeLayer, layout: LayerLayout, part: ExpertPart | QuantPart) -> SlotMatrix:
    if isinstance(part, QuantPart):
        num_out, num_in = part.shape
        base, out_stride = first_word(part, layout.offsets)
        codes = codes_of(part, layout.offsets)
        return SlotMatrix(num_in=num_in, num_out=num_out, base=base, out_stride=out_stride, in_stride=1, codes=codes)
    itemsize = torch_dtype(part.dtype, where=layer.name).itemsize
    out_axis = 1 if layer.transposed else 0
    return SlotMatrix(
        num_in=part.shape[1 - out_axis], num_out=part.shape[out_axis], out_stride=part.strides[out_axis],
        in_stride=part.strides[1 - out_axis], base=layout.offsets[part.source_idx] // itemsize + part.offset,
    )  # fmt: skip


def _alike(first: SlotMatrix, second: SlotMatrix) -> bool:
    plain = [replace(part, base=0, codes=part.codes and part.codes.at_zero) for part in (first, second)]
    return plain[0] == plain[1]


def _apart(codes: Codes | Blocks | None, pair_rows: int) -> Codes | Blocks | None:
    return replace(codes, pair_rows=pair_rows) if isinstance(codes, Codes) else codes


def _pair_of(first: SlotMatrix, second: SlotMatrix) -> SlotMatrix:
    """Gate and up, alike and apart."""
    codes = first.codes
    if isinstance(codes, Codes) and isinstance(second.codes, Codes):
        codes = replace(
            codes, scale_pair=second.codes.scale_base - codes.scale_base,
            zero_pair=second.codes.zero_base - codes.zero_base,
        )  # fmt: skip
    return replace(first, pairs=HALVES, pair_stride=second.base - first.base, codes=codes)


def _side_by_side(parts: list[SlotMatrix]) -> list[SlotMatrix]:
    out_width, begin, placed = sum(part.num_out for part in parts), 0, []
    for part in parts:
        placed.append(replace(part, out_begin=begin, out_width=out_width))
        begin += part.num_out
    return placed
