"""Who computes the rows of experts that lie in the slots of the tier that computes: the torch reference, or kernels.

Shapes: T tokens, D model width, S choices, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from offmoe.executor.dispatch import Assignment
from offmoe.formats.dense import ExpertWeights
from offmoe.kernels.reference import ExpertMath, experts_forward, one_token_forward


@dataclass(frozen=True, slots=True)
class Computed:
    """An expert in slot `slot`, held, and the rows that chose it."""

    slot: int
    weights: ExpertWeights
    assigned: list[Assignment]


class Rows(Protocol):
    """Computes rows of a layer."""

    def compute(
        self, layer_idx: int, math: ExpertMath, experts: list[Computed], x_TD: torch.Tensor, y_SD: torch.Tensor
    ) -> None:
        """Write y of every assigned row into `y_SD`."""


class ReferenceRows:
    """Plain torch on views of the slots, on any device."""

    def compute(
        self, layer_idx: int, math: ExpertMath, experts: list[Computed], x_TD: torch.Tensor, y_SD: torch.Tensor
    ) -> None:
        """One row each (decode): one group. Many rows: expert by expert, to bound memory."""
        flat = [(expert.weights, assignment) for expert in experts for assignment in expert.assigned]
        if all(assignment.tokens_N is None for _, assignment in flat):
            y_KD = one_token_forward(math, [(a.expert_idx, weights) for weights, a in flat], x_TD)
            for row, (_, assignment) in enumerate(flat):
                y_SD[assignment.choices_N] = y_KD[row]
        else:
            for weights, assignment in flat:
                x_ND = x_TD if assignment.tokens_N is None else x_TD[assignment.tokens_N]
                y_SD[assignment.choices_N] = experts_forward(math, [(assignment.expert_idx, weights, x_ND)])
