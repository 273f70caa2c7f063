"""GPTQ's and AWQ's words as compressed-tensors' `pack-quantized`: the same integers, scales and zero points, turned.

N outputs, K inputs, G groups of columns, P codes a word. Both store inputs x outputs: GPTQ packs down the inputs, AWQ
along the outputs and in an order of its own. Values do not change: w = (code - zero) * scale on both sides.
Sources: `pack_original` of https://github.com/ModelCloud/GPTQModel, and `AutoAWQConverter` of compressed-tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from offmoe.core.errors import CheckpointError, UnsupportedModelError

WORD_BITS = 32
# AWQ: nibble i of a word is output 8 j + _AWQ_ORDER[i].
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Packing = Literal["gptq", "gptq_v2", "awq"]


@dataclass(frozen=True, slots=True)
class Repacked:
    """`codes` I32 (N, K/P), `scales` (N, G), `zeros` I32 (ceil(N/P), G); None where all are the middle of the codes."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


def repack(
    packing: Packing, bits: int, qweight: torch.Tensor, scales_GN: torch.Tensor, qzeros: torch.Tensor | None,
    columns: torch.Tensor | None, *, symmetric: bool, name: str,
) -> Repacked:  # fmt: skip
    """One matrix. `columns` is GPTQ's `g_idx`, the group of each input. `symmetric`: no zero points are wanted.

    Raises UnsupportedModelError for columns in the order of activations, and CheckpointError where zero points are not
    what `symmetric` says.
    """
    num_groups, per_word, (num_inputs, num_outputs) = len(scales_GN), WORD_BITS // bits, qweight.shape
    if packing == "awq":
        num_outputs *= per_word
    else:
        num_inputs *= per_word
    if num_groups < 1 or num_inputs % num_groups or scales_GN.shape[1] != num_outputs:
        raise CheckpointError(
            f"{name!r} has codes for {[num_inputs, num_outputs]} and scales for {list(scales_GN.shape)} inputs and "
            "outputs; download the checkpoint again"
        )
    if columns is not None and not torch.equal(columns.long(), torch.arange(num_inputs) // (num_inputs // num_groups)):
        raise UnsupportedModelError(
            f"{name!r} has its columns in the order of activations (desc_act), which no integer format that offmoe "
            "reads can say; use a version quantised without it"
        )
    middle = 1 << (bits - 1)
    if qzeros is None:
        zeros_GN = torch.full_like(scales_GN, middle, dtype=torch.int32)
    elif packing == "awq":
        zeros_GN = _unpack_along(qzeros, bits, _AWQ_ORDER)
    else:
        zeros_GN = _unpack_along(_more_by_one(qzeros, bits) if packing == "gptq" else qzeros, bits)
    zeros_GN = zeros_GN[:, :num_outputs]
    if zeros_GN.shape != scales_GN.shape:
        raise CheckpointError(
            f"{name!r} has zero points for {list(zeros_GN.shape)} and scales for {list(scales_GN.shape)} groups and "
            "outputs; download the checkpoint again"
        )
    if symmetric and not bool((zeros_GN == middle).all()):
        raise CheckpointError(
            f"config.json says that the codes are symmetric, {name!r} has zero points other than {middle}; config and "
            "tensors are of different models"
        )
    return Repacked(
        codes=_turn_awq(qweight) if packing == "awq" else qweight.t().contiguous(), scales=scales_GN.t().contiguous(),
        zeros=None if symmetric else _pack(zeros_GN, bits).t().contiguous(),
    )  # fmt: skip


def _more_by_one(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """The first format's zero points were stored less by one, whole words at a time: what was borrowed comes back."""
    ones = sum(1 << shift for shift in range(0, WORD_BITS, bits))
    return qzeros + ones  # int32 wraps around


def _shifts(bits: int) -> torch.Tensor:
    return torch.arange(0, WORD_BITS, bits, dtype=torch.int32)


def _turn_awq(words_KC: torch.Tensor) -> torch.Tensor:
    """(K, N/8) words along the outputs as (N, K/8) words along the inputs; K is filled up with zeros.

    GPTQ's words need no such turn: they are packed down the inputs already, and only the matrix of words is turned.
    """
    words_KC = torch.nn.functional.pad(words_KC, (0, 0, 0, -len(words_KC) % 8))
    turned_CK = words_KC.t().contiguous().view(words_KC.shape[1], -1, 8)  # eight neighbouring inputs side by side
    found = torch.zeros(words_KC.shape[1], 8, turned_CK.shape[1], dtype=torch.int32)
    for place, output in enumerate(_AWQ_ORDER):
        codes_C = (turned_CK >> (4 * place)) & 15
        for shift in range(8):
            found[:, output] |= codes_C[:, :, shift] << (4 * shift)
    return found.flatten(0, 1)


def _unpack_along(words_RC: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Code i of word j is column P j + order[i]."""
    codes = (words_RC[:, :, None] >> _shifts(bits)) & ((1 << bits) - 1)
    if order is not None:
        codes = codes[:, :, torch.tensor(order).argsort()]
    return codes.reshape(len(words_RC), -1)


def _pack(codes_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Code i of word j is column P j + i, lowest bits first; the last word of a row is filled up with zeros."""
    per_word = WORD_BITS // bits
    codes = torch.nn.functional.pad(codes_RC.int(), (0, -codes_RC.shape[1] % per_word))
    words = (codes.view(len(codes), -1, per_word).long() << _shifts(bits).long()).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
