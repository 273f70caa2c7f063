"""Tokens by expert: from the router's choices to the rows that each expert computes.

Shapes: T tokens, K experts a token, S = T * K choices, numbered t * K + k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offmoe.kernels.indices import upload

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Assignment:
    """One expert's rows: `choices_N` index the S choices, `tokens_N` the T tokens. None means the only token.

    `host_tokens_N` are `tokens_N` once more, where the host can read them.
    """

    expert_idx: int
    num_rows: int
    choices_N: torch.Tensor | int
    tokens_N: torch.Tensor | None
    host_tokens_N: torch.Tensor | None = None


def num_rows(assigned: list[Assignment]) -> int:
    """Rows of several assignments."""
    return sum(assignment.num_rows for assignment in assigned)


def dispatch(expert_ids_TK: torch.Tensor, num_experts: int, *, device: torch.device = CPU) -> list[Assignment]:
    """Group the choices by expert, in order of expert id. Ids outside [0, num_experts) are padding and dropped.

    `expert_ids_TK` is on the host; `choices_N` and `tokens_N` are made on `device`.
    """
    num_tokens, top_k = expert_ids_TK.shape
    if num_tokens == 1:
        return _dispatch_one(expert_ids_TK[0].tolist(), num_experts)
    ids_S = expert_ids_TK.reshape(-1)
    order_S = torch.argsort(ids_S, stable=True)
    experts, counts = torch.unique_consecutive(ids_S[order_S], return_counts=True)
    host_tokens_S = order_S // top_k
    choices_S, tokens_S = upload(torch.stack((order_S, host_tokens_S)), device)
    assignments, begin = [], 0
    for expert_idx, count in zip(experts.tolist(), counts.tolist(), strict=True):
        rows = slice(begin, begin + count)
        begin += count
        if 0 <= expert_idx < num_experts:
            assignments.append(Assignment(expert_idx, count, choices_S[rows], tokens_S[rows], host_tokens_S[rows]))
    return assignments


def _dispatch_one(ids: list[int], num_experts: int) -> list[Assignment]:
    """Decode of one token: no sorting, no index tensors. An expert chosen twice gets two assignments."""
    return sorted(
        (Assignment(idx, 1, choice, None) for choice, idx in enumerate(ids) if 0 <= idx < num_experts),
        key=lambda assignment: assignment.expert_idx,
    )
