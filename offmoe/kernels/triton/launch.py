"""One MoE layer's Triton launches.

Shapes: N rows (token, expert), T tokens, D model width, F expert width, K experts a token, M tiles of B rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from offmoe.checkpoint.expert_index import MoeLayer
from offmoe.formats.dense import STORED_DTYPES
from offmoe.formats.layout import LayerLayout
from offmoe.kernels.activations import KINDS, Activation
from offmoe.kernels.codes import Blocks
from offmoe.kernels.geometry import (
    TILES_TOGETHER,
    TURNS,
    SlotMatrix,
    Tiling,
    down_matrices,
    power_of_two,
    up_matrices,
)
from offmoe.kernels.reference import ExpertMath
from offmoe.kernels.triton import experts as triton_experts


class LayerKernels:
    """The launches of one layer. Rows of slot -1 come out as zero. All on the caller's current stream.

    Inputs are contiguous, on the slab's device; indices are int32 or int64.
    """

    def __init__(
        self, layer: MoeLayer, layout: LayerLayout, math: ExpertMath, activation: Activation | None,
        slab: torch.Tensor, slot_bytes: int, tiling: Tiling,
    ) -> None:  # fmt: skip
        self._slab, self._slot_bytes = slab, slot_bytes
        self._math, self._tiling = math, tiling
        self._launches: Any = triton_experts
        self.num_experts, self.has_tiles = layer.num_experts, tiling.has_tiles
        self.up, self.is_fused = up_matrices(layer, layout, activation)
        self.down = down_matrices(layer, layout)
        self._views = {id(matrix): self._views_of(matrix) for matrix in (*self.up, *self.down)}
        self._up_act = _activation_constants(activation if self.is_fused else None)
        self._no_act = _activation_constants(None)

    def compiling(self) -> LayerKernels:
        """The same launches, each of which compiles its kernel and does not run it: their outputs hold anything."""
        twin = copy.copy(self)
        twin._launches = _Compiling()
        return twin

    def geometry(self) -> tuple[object, ...]:
        """Properties that compiled kernels depend on: layers that share the properties share the kernels."""
        biases = (self._math.up_bias_EF is None, self._math.down_bias_ED is None)
        return (
            tuple(self.up),
            tuple(self.down),
            tuple(self._up_act.items()),
            self._math.dtype,
            self._slot_bytes,
            biases,
        )

    def choose(
        self, x_TD: torch.Tensor, token_N: torch.Tensor | int, expert_N: torch.Tensor, slot_N: torch.Tensor,
        *, missing: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """hidden_NF, row by row. An int `token_N` says how many rows each token has.

        With `missing` (one int32) `slot_N` is instead the slot of every expert, and the rows without one are counted.
        """
        up = self._rows(self.up, x_TD, token_N, expert_N, slot_N, self._up_act, self._math.up_bias_EF, missing=missing)
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
            self._launches.weighted_rows[(num_tokens, -(-matrix.num_out // blocks["BLOCK_OUT"]))](
                hidden_NF, *self._views[id(matrix)], bias, y_TD, expert_TK, slots, weights_TK, hidden_NF,
                **self._place(matrix), HAS_BIAS=bias is not None, BIAS_WIDTH=matrix.out_width, TOP_K=top_k,
                BLOCK_K=block_k, NUM_EXPERTS=self.num_experts if lookup else 0, **blocks,
            )  # fmt: skip
        return y_TD

    def tiles(
        self, x_TD: torch.Tensor, token_N: torch.Tensor, expert_N: torch.Tensor,
        tile_slot_M: torch.Tensor, tile_row_MB: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """y_ND by tiles: every slot's weights are read once for up to B rows."""
        tiles = (tile_slot_M, tile_row_MB)
        up = self._tiles(self.up, x_TD, token_N, expert_N, tiles, self._up_act, self._math.up_bias_EF)
        hidden_NF = up if self.is_fused else self._math.activate(up)
        bias = self._math.down_bias_ED
        return self._tiles(self.down, hidden_NF, 1, expert_N, tiles, self._no_act, bias, is_down=True)

    def _rows(
        self, matrices: list[SlotMatrix], inputs: torch.Tensor, token_N: torch.Tensor | int, expert_N: torch.Tensor,
        slot_N: torch.Tensor, act: dict[str, Any], bias: torch.Tensor | None,
        *, missing: torch.Tensor | None = None, lookup: bool = False, is_down: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        out = inputs.new_empty((expert_N.numel(), matrices[0].out_width), dtype=self._math.dtype)
        rows_a_token = token_N if isinstance(token_N, int) else 0
        for number, matrix in enumerate(matrices):
            blocks = self._tiling.row_blocks(matrix)
            self._launches.choose_rows[(expert_N.numel(), -(-matrix.num_out // blocks["BLOCK_OUT"]))](
                inputs, *self._views[id(matrix)], bias, out, None if rows_a_token else token_N, expert_N, slot_N,
                missing, **self._place(matrix), **_pairs(matrix, bias), **act, ROWS_A_TOKEN=rows_a_token,
                NUM_EXPERTS=self.num_experts if lookup or missing is not None else 0,
                COUNT_MISSING=missing is not None and number == 0, ZERO_MISSING=is_down or not self.is_fused,
                **blocks,
            )  # fmt: skip
        return out

    def _tiles(
        self, matrices: list[SlotMatrix], inputs: torch.Tensor, token_N: torch.Tensor | int, expert_N: torch.Tensor,
        tiles: tuple[torch.Tensor, torch.Tensor], act: dict[str, Any], bias: torch.Tensor | None,
        *, is_down: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        tile_slot_M, tile_row_MB = tiles
        out = inputs.new_empty((expert_N.numel(), matrices[0].out_width), dtype=self._math.dtype)
        rows_a_token = token_N if isinstance(token_N, int) else 0
        for matrix in matrices:
            blocks = self._tiling.tile_blocks(matrix, tile_row_MB.shape[1], self._math.dtype.itemsize)
            self._launches.tile_rows[(-(-matrix.num_out // blocks["BLOCK_OUT"]) * tile_slot_M.numel(),)](
                inputs, *self._views[id(matrix)], bias, out, None if rows_a_token else token_N, expert_N, tile_slot_M,
                tile_row_MB, **self._place(matrix), **_pairs(matrix, bias), **act, ROWS_A_TOKEN=rows_a_token,
                ZERO_MISSING=is_down or not self.is_fused, TOGETHER=TILES_TOGETHER,
                WIDEN=inputs.device.type == "cpu", **blocks,
            )  # fmt: skip
        return out

    def _views_of(self, matrix: SlotMatrix) -> tuple[torch.Tensor | None, ...]:
        """The slab as weights, scales and zero points: made once, as a view costs as much as a launch."""
        codes = matrix.codes
        if codes is None:
            return self._slab.view(self._math.dtype), None, None
        if isinstance(codes, Blocks):
            return self._slab, self._slab.view(torch.float16), None
        zeros = self._slab.view(STORED_DTYPES[codes.zero_type]) if codes.zero_rows else None
        return self._slab.view(torch.int32), self._slab.view(STORED_DTYPES[codes.scale_type]), zeros

    def _place(self, matrix: SlotMatrix) -> dict[str, Any]:
        itemsize = self._math.dtype.itemsize if matrix.codes is None else matrix.codes.itemsize
        return {
            "NUM_IN": matrix.num_in, "NUM_OUT": matrix.num_out, "OUT_WIDTH": matrix.out_width,
            "OUT_BEGIN": matrix.out_begin, "SLOT": self._slot_bytes // itemsize, "BASE": matrix.base,
            "OUT_STRIDE": matrix.out_stride, "IN_STRIDE": matrix.in_stride, "FORMAT": matrix.codes,
        }  # fmt: skip


class _Compiling:
    """Stands for `triton_experts`: what launches a kernel there compiles it here."""

    def __getattr__(self, name: str) -> _Compile:
        return _Compile(getattr(triton_experts, name))


class _Compile:
    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self._kernel.warmup, grid=grid)


def _pairs(matrix: SlotMatrix, bias: torch.Tensor | None) -> dict[str, int]:
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
