"""The experts' arithmetic in plain torch: the oracle of every faster kernel, and the path that always works.

Shapes: N rows (tokens of one expert), D model width, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from offmoe.formats.dense import ExpertWeights
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.indices import upload

# Rows of a multiple of this end with a whole vector, whether gated or not, in every type and instruction set.
VECTOR_ELEMENTS = 128
# Tokens per float32 block of a weighted sum, so that a long prefill needs no (T * K, D) tensor of that type.
COMBINE_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class ExpertMath:
    """Arithmetic of a layer between and after its two projections, taken from the model's own experts module.

    `activate` maps (N, 2F) to (N, F) for gated experts, (N, F) to (N, F) for others. Biases are per expert, resident.
    `dtype` is what the model computes in; weights stored otherwise are converted on use, as transformers converts them
    on load.
    """

    activate: Callable[[torch.Tensor], torch.Tensor]
    up_bias_EF: torch.Tensor | None
    down_bias_ED: torch.Tensor | None
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None
    transposed: bool
    dtype: torch.dtype


# As torch's `linear`, without a bias.
Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def experts_forward(
    math: ExpertMath, experts: Sequence[tuple[int, ExpertWeights, torch.Tensor]], *,
    multiply: Multiply = torch.nn.functional.linear,
) -> torch.Tensor:  # fmt: skip
    """Rows of several experts, in order: each item is (expert_idx, weights, x_ND); returns their y_ND concatenated.

    Every row's result depends on that row alone, to the bit: grouping experts one way or another changes nothing.
    """
    counts = [x_ND.shape[0] for _, _, x_ND in experts]
    up = _cat([
        _project(_padded(x_ND.to(math.dtype)), weights.up, math, multiply)[: len(x_ND)] for _, weights, x_ND in experts
    ])  # fmt: skip
    hidden = _activate(math, _add_bias(up, math.up_bias_EF, experts, counts), counts)
    y = _cat([
        _project(_padded(h_NF), weights.down, math, multiply)[: len(h_NF)]
        for (_, weights, _), h_NF in zip(experts, torch.split(hidden, counts), strict=True)
    ])  # fmt: skip
    y = _add_bias(y, math.down_bias_ED, experts, counts)
    return y if math.post_norm is None else math.post_norm(y)


def one_token_forward(
    math: ExpertMath, experts: Sequence[tuple[int, ExpertWeights]], x_1D: torch.Tensor
) -> torch.Tensor:
    """`experts_forward` for one token that all the experts share: y_KD, the same numbers with fewer small operations.

    Neighbouring rows serve as each other's padding, so nothing is copied for it.
    """
    num_rows = _padded_rows(1, math.dtype)
    x = x_1D.to(math.dtype).expand(num_rows, -1).contiguous()
    up = torch.cat([_project(x, weights.up, math)[:1] for _, weights in experts])
    counts = [1] * len(experts)
    hidden = _activate(math, _add_bias(up, math.up_bias_EF, experts, counts), counts)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, num_rows - 1))
    y = torch.cat([
        _project(hidden[row : row + num_rows], weights.down, math)[:1] for row, (_, weights) in enumerate(experts)
    ])  # fmt: skip
    y = _add_bias(y, math.down_bias_ED, experts, counts)
    return y if math.post_norm is None else math.post_norm(y)


def combine_rows(y_ND: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of every token's K rows, weighted, in the router's order: (T * K, D), (T, K) -> (T, D)."""
    num_tokens, y_TKD = len(weights_TK), y_ND.view(*weights_TK.shape, -1)
    blocks = [
        (y_TKD[begin : begin + COMBINE_TOKENS] * weights_TK[begin : begin + COMBINE_TOKENS, :, None])
        .sum(dim=1)
        .to(dtype)
        for begin in range(0, num_tokens, COMBINE_TOKENS)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _activate(math: ExpertMath, up: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The activation, on all rows at once (8 rows: 14 us, against 100 us one by one, measured) where no bit differs.

    What is left of an array after its last whole vector torch computes by scalar code, whose exponentials round
    otherwise; so rows of odd width are computed expert by expert.
    """
    if len(counts) == 1 or up.shape[-1] % VECTOR_ELEMENTS == 0:
        return math.activate(up)
    return torch.cat([math.activate(rows) for rows in torch.split(up, counts)])


def _padded_rows(num_rows: int, dtype: torch.dtype) -> int:
    """Row counts are rounded up so that few different matrix shapes occur, and never one.

    oneDNN compiles and keeps a kernel for every shape it meets: with experts' row counts as they come, a 1024-token
    prefill compiled hundreds and grew the process by 190 MiB (768 experts of 3 x 2048 x 768, bfloat16). And its kernel
    for one row reads weights at 11.8 GB/s where the one for two rows reads 13.5. Float32 goes elsewhere and stays.
    """
    if dtype == torch.float32:
        return num_rows
    if num_rows <= 16:
        return max(2, 1 << (num_rows - 1).bit_length())
    step = 16 if num_rows <= 128 else 64
    return -(-num_rows // step) * step


def _padded(x: torch.Tensor) -> torch.Tensor:
    missing = _padded_rows(x.shape[0], x.dtype) - x.shape[0]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def _project(
    x: torch.Tensor, parts: tuple[torch.Tensor | QuantMatrix, ...], math: ExpertMath,
    multiply: Multiply = torch.nn.functional.linear,
) -> torch.Tensor:  # fmt: skip
    outputs = []
    for part in parts:
        if isinstance(part, QuantMatrix) and part.format.is_lossless:
            outputs.append(multiply(x, part.dequantise(math.dtype)))
            continue
        if isinstance(part, QuantMatrix):
            outputs += _project_quantised(x, part, math.dtype, multiply)
            continue
        weight = part if part.dtype == math.dtype else part.to(math.dtype)
        outputs.append(multiply(x, weight.T if math.transposed else weight))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _project_quantised(
    x: torch.Tensor, matrix: QuantMatrix, dtype: torch.dtype, multiply: Multiply
) -> list[torch.Tensor]:  # fmt: skip
    """Products with blocks of the matrix's rows, so that its values never exist all at once."""
    return [multiply(x, matrix.dequantise(dtype, rows)) for rows in matrix.row_blocks()]


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _add_bias(
    y: torch.Tensor, bias: torch.Tensor | None, experts: Sequence[tuple[Any, ...]], counts: list[int]
) -> torch.Tensor:
    """Add each expert's bias to its rows; an item's first field is the expert's number."""
    if bias is None:
        return y
    if len(experts) == 1:
        return y + bias[experts[0][0]]
    rows = [item[0] for item, count in zip(experts, counts, strict=True) for _ in range(count)]
    return y + bias[upload(torch.tensor(rows), bias.device)]
