"""One MoE layer's Triton kernels: which matrix lies where, how large the blocks are, and the launches.

Shapes: N rows (token, expert), T tokens, D model width, F expert width, K experts a token, M tiles of B rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from offmoe.checkpoint.expert_index import MoeLayer, Part
from offmoe.formats.dense import torch_dtype
from offmoe.formats.layout import LayerLayout
from offmoe.kernels import triton_experts
from offmoe.kernels.activations import KINDS, Activation
from offmoe.kernels.reference import ExpertMath

HALVES, TURNS = 1, 2
# Rows of a tile: 16 is the least that tensor cores take.
TILE_ROWS = (16, 64, 128)
# Tiles that run side by side, block by block, so that an expert's tiles read its weights from L2 after the first, and
# their inputs, 8 tiles of 128 rows of 4096 bfloat16, fit there too.
TILES_TOGETHER = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One launch's weights, in elements: see triton_experts. `num_out` counts the outputs after pairing."""

    num_in: int
    num_out: int
    base: int
    out_stride: int
    in_stride: int
    pairs: int = 0
    pair_stride: int = 0
    out_begin: int = 0
    out_width: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Block sizes. Elements are the weights that one program of a row kernel holds at once.

    4096 in 4 warps: 32 a thread, 4 loads of 16 bytes in flight; some 1500 programs for 8 rows of 2 x 768 x 2048. Where
    outputs lie contiguous, a block of `column_outputs` is whole sectors of memory and still leaves enough programs.
    """

    row_elements: int = 4096
    row_inputs: int = 512
    row_warps: int = 4
    sum_elements: int = 8192
    sum_inputs: int = 256
    sum_warps: int = 8
    column_outputs: int = 32
    stages: int = 1
    shared_bytes: int = 48 * 1024

    def row_blocks(self, matrix: Matrix) -> dict[str, int]:
        """Blocks of a program that computes one row."""
        elements = self.row_elements // (2 if matrix.pairs else 1)
        return {**_blocks(matrix, elements, self.row_inputs, self.column_outputs), **self._row_options(self.row_warps)}

    def sum_blocks(self, matrix: Matrix, block_k: int) -> dict[str, int]:
        """Blocks of a program that computes a token's `block_k` rows."""
        elements = self.sum_elements // block_k
        blocks = _blocks(matrix, elements, self.sum_inputs, self.column_outputs // 2)
        return {**blocks, **self._row_options(self.sum_warps)}

    def _row_options(self, num_warps: int) -> dict[str, int]:
        return {"STAGES": self.stages, "num_warps": num_warps, "enable_fp_fusion": True}

    def tile_blocks(self, matrix: Matrix, block_rows: int, itemsize: int) -> dict[str, int]:
        """Blocks, warps and stages of a tile, as many stages as the shared memory holds."""
        outputs = 64 if block_rows == TILE_ROWS[0] else 128
        block_in = max(16, 128 // itemsize)
        stage_bytes = (block_rows + outputs) * block_in * itemsize
        return {
            "BLOCK_ROWS": block_rows,
            "BLOCK_OUT": outputs // (2 if matrix.pairs else 1),
            "BLOCK_IN": block_in,
            "num_warps": 8 if block_rows > 64 else 4,
            "num_stages": max(1, min(4, self.shared_bytes // stage_bytes)),
            "enable_fp_fusion": True,
        }


def _blocks(matrix: Matrix, elements: int, inputs: int, column_outputs: int) -> dict[str, int]:
    """Outputs and inputs of a block: long along the dimension that lies contiguous."""
    elements = max(1, elements)
    if matrix.in_stride == 1 or matrix.out_stride != 1:
        block_in = min(inputs, power_of_two(matrix.num_in), elements)
        return {"BLOCK_OUT": min(elements // block_in, power_of_two(matrix.num_out)), "BLOCK_IN": block_in}
    block_out = min(column_outputs, power_of_two(matrix.num_out), elements)
    return {"BLOCK_OUT": block_out, "BLOCK_IN": min(elements // block_out, power_of_two(matrix.num_in))}


def power_of_two(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


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


def up_matrices(layer: MoeLayer, layout: LayerLayout, activation: Activation | None) -> tuple[list[Matrix], bool]:
    """The launches of the up projection, and whether the activation is in them."""
    parts = [_matrix(layer, layout, part) for part in layer.up]
    if activation is None or (not activation.gated and len(parts) > 1):
        return _side_by_side(parts), False
    first = parts[0]
    if not activation.gated:
        return _side_by_side(parts), True
    width_F = sum(part.num_out for part in parts) // 2
    if activation.interleaved and len(parts) == 1:
        pairs, pair_stride = TURNS, first.out_stride
    elif not activation.interleaved and len(parts) == 1:
        pairs, pair_stride = HALVES, width_F * first.out_stride
    elif not activation.interleaved and len(parts) == 2 and _alike(*parts):
        pairs, pair_stride = HALVES, parts[1].base - first.base
    else:
        return _side_by_side(parts), False
    fused = Matrix(
        num_in=first.num_in, num_out=width_F, base=first.base, out_stride=first.out_stride,
        in_stride=first.in_stride, pairs=pairs, pair_stride=pair_stride, out_width=width_F,
    )  # fmt: skip
    return [fused], True


def down_matrices(layer: MoeLayer, layout: LayerLayout) -> list[Matrix]:
    """The launches of the down projection."""
    return _side_by_side([_matrix(layer, layout, part) for part in layer.down])


def _matrix(layer: MoeLayer, layout: LayerLayout, part: Part) -> Matrix:
    itemsize = torch_dtype(part.dtype, where=layer.name).itemsize
    out_axis = 1 if layer.transposed else 0
    return Matrix(
        num_in=part.shape[1 - out_axis], num_out=part.shape[out_axis], out_stride=part.strides[out_axis],
        in_stride=part.strides[1 - out_axis], base=layout.offsets[part.source_idx] // itemsize + part.offset,
    )  # fmt: skip


def _alike(first: Matrix, second: Matrix) -> bool:
    return (first.num_in, first.num_out, first.out_stride, first.in_stride) == (
        second.num_in, second.num_out, second.out_stride, second.in_stride,
    )  # fmt: skip


def _side_by_side(parts: list[Matrix]) -> list[Matrix]:
    out_width, begin, placed = sum(part.num_out for part in parts), 0, []
    for part in parts:
        placed.append(
            Matrix(
                num_in=part.num_in, num_out=part.num_out, base=part.base, out_stride=part.out_stride,
                in_stride=part.in_stride, out_begin=begin, out_width=out_width,
            )
        )  # fmt: skip
        begin += part.num_out
    return placed


class LayerKernels:
    """The launches of one layer. Rows of slot -1 come out as zero. All on the caller's current stream.

    `slab` is typed as the layer computes. Inputs are contiguous, on its device; indices are int32 or int64.
    """

    def __init__(
        self, layer: MoeLayer, layout: LayerLayout, math: ExpertMath, activation: Activation | None,
        slab: torch.Tensor, slot_bytes: int, tiling: Tiling,
    ) -> None:  # fmt: skip
        self._slab, self._slot = slab.view(math.dtype), slot_bytes // math.dtype.itemsize
        self._math, self._tiling = math, tiling
        self.num_experts = layer.num_experts
        self.up, self.is_fused = up_matrices(layer, layout, activation)
        self.down = down_matrices(layer, layout)
        self._act = _activation_constants(activation if self.is_fused else None)
        self._no_act = _activation_constants(None)

    def geometry(self) -> tuple[object, ...]:
        """What the compiled kernels depend on: layers that have it in common share them."""
        biases = (self._math.up_bias_EF is None, self._math.down_bias_ED is None)
        return (tuple(self.up), tuple(self.down), tuple(self._act.items()), self._math.dtype, self._slot, biases)

    def choose(
        self, x_TD: torch.Tensor, token_N: torch.Tensor | int, expert_N: torch.Tensor, slot_N: torch.Tensor,
        *, missing: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """hidden_NF, row by row. An int `token_N` says how many rows each token has.

        With `missing` (one int32) `slot_N` is instead the slot of every expert, and the rows without one are counted.
        """
        up = self._rows(self.up, x_TD, token_N, expert_N, slot_N, self._act, self._math.up_bias_EF, missing=missing)
        return up if self.is_fused else self._math.activate(up)

    def project(
        self, hidden_NF: torch.Tensor, expert_N: torch.Tensor, slot_N: torch.Tensor, *, lookup: bool = False
    ) -> torch.Tensor:
        """y_ND, row by row."""
        bias = self._math.down_bias_ED
        return self._rows(self.down, hidden_NF, 1, expert_N, slot_N, self._no_act, bias, lookup=lookup, is_down=True)

    def project_and_sum(
        self, hidden_NF: torch.Tensor, expert_TK: torch.Tensor, slots: torch.Tensor, weights_TK: torch.Tensor,
        dtype: torch.dtype, *, lookup: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """y_TD, each token's rows weighted and summed in float32."""
        num_tokens, top_k = weights_TK.shape
        block_k, bias = power_of_two(top_k), self._math.down_bias_ED
        y_TD = hidden_NF.new_empty((num_tokens, self.down[0].out_width), dtype=dtype)
        for matrix in self.down:
            blocks = self._tiling.sum_blocks(matrix, block_k)
            triton_experts.weighted_rows[(num_tokens, -(-matrix.num_out // blocks["BLOCK_OUT"]))](
                hidden_NF, self._slab, bias, y_TD, expert_TK, slots, weights_TK, hidden_NF, **self._place(matrix),
                HAS_BIAS=bias is not None, BIAS_WIDTH=matrix.out_width, TOP_K=top_k, BLOCK_K=block_k,
                NUM_EXPERTS=self.num_experts if lookup else 0, **blocks,
            )  # fmt: skip
        return y_TD

    def tiles(
        self, x_TD: torch.Tensor, token_N: torch.Tensor, expert_N: torch.Tensor,
        tile_slot_M: torch.Tensor, tile_row_MB: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """y_ND by tiles: every slot's weights are read once for up to B rows."""
        tiles = (tile_slot_M, tile_row_MB)
        up = self._tiles(self.up, x_TD, token_N, expert_N, tiles, self._act, self._math.up_bias_EF)
        hidden_NF = up if self.is_fused else self._math.activate(up)
        bias = self._math.down_bias_ED
        return self._tiles(self.down, hidden_NF, 1, expert_N, tiles, self._no_act, bias, is_down=True)

    def _rows(
        self, matrices: list[Matrix], inputs: torch.Tensor, token_N: torch.Tensor | int, expert_N: torch.Tensor,
        slot_N: torch.Tensor, act: dict[str, Any], bias: torch.Tensor | None,
        *, missing: torch.Tensor | None = None, lookup: bool = False, is_down: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        out = inputs.new_empty((expert_N.numel(), matrices[0].out_width), dtype=self._math.dtype)
        rows_a_token = token_N if isinstance(token_N, int) else 0
        for number, matrix in enumerate(matrices):
            blocks = self._tiling.row_blocks(matrix)
            triton_experts.choose_rows[(expert_N.numel(), -(-matrix.num_out // blocks["BLOCK_OUT"]))](
                inputs, self._slab, bias, out, None if rows_a_token else token_N, expert_N, slot_N, missing,
                **self._place(matrix), **_pairs(matrix, bias), **act, ROWS_A_TOKEN=rows_a_token,
                NUM_EXPERTS=self.num_experts if lookup or missing is not None else 0,
                COUNT_MISSING=missing is not None and number == 0, ZERO_MISSING=is_down or not self.is_fused,
                **blocks,
            )  # fmt: skip
        return out

    def _tiles(
        self, matrices: list[Matrix], inputs: torch.Tensor, token_N: torch.Tensor | int, expert_N: torch.Tensor,
        tiles: tuple[torch.Tensor, torch.Tensor], act: dict[str, Any], bias: torch.Tensor | None,
        *, is_down: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        tile_slot_M, tile_row_MB = tiles
        out = inputs.new_empty((expert_N.numel(), matrices[0].out_width), dtype=self._math.dtype)
        rows_a_token = token_N if isinstance(token_N, int) else 0
        for matrix in matrices:
            blocks = self._tiling.tile_blocks(matrix, tile_row_MB.shape[1], self._math.dtype.itemsize)
            triton_experts.tile_rows[(-(-matrix.num_out // blocks["BLOCK_OUT"]) * tile_slot_M.numel(),)](
                inputs, self._slab, bias, out, None if rows_a_token else token_N, expert_N, tile_slot_M, tile_row_MB,
                **self._place(matrix), **_pairs(matrix, bias), **act, ROWS_A_TOKEN=rows_a_token,
                ZERO_MISSING=is_down or not self.is_fused, TOGETHER=TILES_TOGETHER,
                WIDEN=inputs.device.type == "cpu", **blocks,
            )  # fmt: skip
        return out

    def _place(self, matrix: Matrix) -> dict[str, int]:
        return {
            "NUM_IN": matrix.num_in, "NUM_OUT": matrix.num_out, "OUT_WIDTH": matrix.out_width,
            "OUT_BEGIN": matrix.out_begin, "SLOT": self._slot, "BASE": matrix.base, "OUT_STRIDE": matrix.out_stride,
            "IN_STRIDE": matrix.in_stride,
        }  # fmt: skip


def _pairs(matrix: Matrix, bias: torch.Tensor | None) -> dict[str, int]:
    return {
        "PAIRS": matrix.pairs, "PAIR_STRIDE": matrix.pair_stride, "HAS_BIAS": bias is not None,
        "BIAS_WIDTH": matrix.out_width * (2 if matrix.pairs else 1), "BIAS_STRIDE": 1,
        "BIAS_PAIR": 1 if matrix.pairs == TURNS else matrix.num_out,
    }  # fmt: skip


def _activation_constants(activation: Activation | None) -> dict[str, Any]:
    known = activation or Activation(kind="none", gated=False)
    return {
        "KIND": KINDS.index(known.kind), "ALPHA": known.alpha, "OFFSET": known.offset,
        "GATE_LIMIT": -1.0 if known.gate_limit is None else known.gate_limit,
        "UP_LIMIT": -1.0 if known.up_limit is None else known.up_limit,
    }  # fmt: skip
