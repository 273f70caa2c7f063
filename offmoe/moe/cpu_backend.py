"""Rows computed in RAM by the C++ kernels (kernels/cpu), which read an expert's weights once for all of its rows.

Which way a row is computed depends on how many rows its expert has in the call, never on what is cached: so the
numbers do not either. Shapes: T tokens, D model width, K experts a token, S = T * K choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from offmoe.formats.dense import ExpertWeights
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu.decode import CpuTokenExperts
from offmoe.kernels.cpu.kernels import CpuKernels, CpuLayer, ExpertRows
from offmoe.kernels.products import most_rows, multiply
from offmoe.kernels.reference import ExpertMath, experts_forward
from offmoe.kernels.row_blocks import RowBlocks, active_blocks
from offmoe.moe.backends import Computed, ReferenceBackend
from offmoe.moe.dispatch import num_rows

# Rows of one expert with quantised weights that go through the kernels whatever the processor; more are a product for
# torch, which turns the weights into values first, unless the kernels have tiles.
MAX_QUANTISED_ROWS = 64
# Hidden units that one call computes: the library keeps eight bytes for each, some 34 MB.
CALL_NUMBERS, LEAST_CALL_ROWS = 1 << 22, 64


class CpuBackend:
    """Rows by the kernels, where they know the layer's formats and arithmetic; otherwise by `ReferenceBackend`.

    `reasons`: layer -> why its rows are not computed by the kernels, for those seen so far.
    """

    def __init__(self, kernels: CpuKernels) -> None:
        self.kernels = kernels
        self.reasons: dict[int, str] = {}
        self._layers: dict[int, tuple[ExpertMath, CpuLayer | None]] = {}
        self._tokens: dict[int, CpuTokenExperts] = {}
        self._reference = ReferenceBackend(multiply)

    def compute(
        self, layer_idx: int, math: ExpertMath, experts: list[Computed], x_TD: torch.Tensor, y_SD: torch.Tensor
    ) -> None:
        """Experts with few rows in one call; the others one by one."""
        layer = self.layer(layer_idx, math, experts[0].weights)
        blocks = active_blocks()
        if blocks is not None and x_TD.shape[0] > 1:
            self._compute_in_blocks(blocks, layer, math, experts, x_TD, y_SD)
            return
        if layer is None:
            self._reference.compute(layer_idx, math, experts, x_TD, y_SD)
            return
        most = self._most_rows(math, experts[0].weights)
        few = [_rows_of(expert) for expert in experts if num_rows(expert.assigned) <= most]
        for rows in _calls(few, max(LEAST_CALL_ROWS, CALL_NUMBERS // layer.hidden)):
            self.kernels.experts(layer, rows, _by_rows(x_TD), y_SD)
        many = [expert for expert in experts if num_rows(expert.assigned) > most]
        if many:
            self._reference.compute(layer_idx, math, many, x_TD, y_SD)

    def _compute_in_blocks(
        self, blocks: RowBlocks, layer: CpuLayer | None, math: ExpertMath, experts: list[Computed],
        x_TD: torch.Tensor, y_SD: torch.Tensor,
    ) -> None:  # fmt: skip
        """Which way a row goes depends on the rows of its block that chose its expert, and on no others."""
        most = self._most_rows(math, experts[0].weights) if layer is not None else 0
        few: list[ExpertRows] = []
        for expert in experts:
            expert_idx, weights, tokens, choices = _rows_of(expert)
            by_kernels: tuple[list[int], list[int]] = ([], [])
            for rows in blocks.split_rows(tokens):
                if len(rows) <= most:
                    by_kernels[0].extend(tokens[row] for row in rows)
                    by_kernels[1].extend(choices[row] for row in rows)
                    continue
                x_ND = x_TD[[tokens[row] for row in rows]]
                y_SD[[choices[row] for row in rows]] = experts_forward(
                    math, [(expert_idx, weights, x_ND)], multiply=multiply
                )
            if by_kernels[0]:
                few.append((expert_idx, weights, *by_kernels))
        for call in _calls(few, max(LEAST_CALL_ROWS, CALL_NUMBERS // layer.hidden)) if layer is not None else ():
            assert layer is not None
            self.kernels.experts(layer, call, _by_rows(x_TD), y_SD)

    def _most_rows(self, math: ExpertMath, weights: ExpertWeights) -> int:
        """Rows of one expert that the kernels are given."""
        most = most_rows(math.dtype, in_tiles=self.kernels.has_tiles and not math.transposed)
        first = weights.up[0]
        is_quantised = isinstance(first, QuantMatrix) and not first.format.is_lossless
        return max(most, MAX_QUANTISED_ROWS) if is_quantised else most

    def token_sum(
        self, layer_idx: int, layer: CpuLayer, expert_ids: Sequence[int], experts: Sequence[ExpertWeights],
        x_1D: torch.Tensor, weights_1K: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The weighted sum over one token's experts, (1, D) in x's type: to the bit what `compute`, then `combine_rows`
        give.
        """
        x_1D, weights_1K = x_1D.contiguous(), weights_1K.contiguous()
        known = self._tokens.get(layer_idx)
        if known is None or known.layer is not layer or not known.takes(x_1D, weights_1K):
            known = self._tokens[layer_idx] = CpuTokenExperts(self.kernels, layer, len(experts), x_1D, weights_1K)
        return known(expert_ids, experts, x_1D, weights_1K)

    def seen(self, layer_idx: int, math: ExpertMath) -> CpuLayer | None:
        """The answer of `layer` for a layer whose experts were seen; None of others."""
        known = self._layers.get(layer_idx)
        return known[1] if known is not None and known[0] is math else None

    def layer(self, layer_idx: int, math: ExpertMath, weights: ExpertWeights) -> CpuLayer | None:
        """Description of a layer for the kernels, None where they do not serve it. Experts of a layer are all stored
        alike, so the weights of any one answer for all.
        """
        known = self._layers.get(layer_idx)
        if known is not None and known[0] is math:
            return known[1]
        reason = self.kernels.supports(math, weights)
        layer = self.kernels.layer(math, weights) if reason is None else None
        if reason is not None:
            self.reasons[layer_idx] = reason
        self._layers[layer_idx] = (math, layer)
        return layer


def _rows_of(expert: Computed) -> ExpertRows:
    tokens: list[int] = []
    choices: list[int] = []
    for assignment in expert.assigned:
        if isinstance(assignment.choices_N, int):
            tokens.append(0)
            choices.append(assignment.choices_N)
        else:
            assert assignment.host_tokens_N is not None, f"{assignment=}"
            tokens += assignment.host_tokens_N.tolist()
            choices += assignment.choices_N.tolist()
    return expert.assigned[0].expert_idx, expert.weights, tokens, choices


def _calls(experts: list[ExpertRows], most: int) -> Iterator[list[ExpertRows]]:
    """The same rows in calls of at most `most`."""
    rows: list[ExpertRows] = []
    room = most
    for expert_idx, weights, tokens, choices in experts:
        begin = 0
        while begin < len(tokens):
            end = min(begin + room, len(tokens))
            rows.append((expert_idx, weights, tokens[begin:end], choices[begin:end]))
            room, begin = room - (end - begin), end
            if room == 0:
                yield rows
                rows, room = [], most
    if rows:
        yield rows


def _by_rows(x_TD: torch.Tensor) -> torch.Tensor:
    return x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous()
