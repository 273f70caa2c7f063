"""Backends that compute rows of experts in the slots of the computing tier: the torch reference, or kernels.

Shapes: T tokens, D model width, S choices, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from offmoe.formats.dense import ExpertWeights
from offmoe.kernels.indices import upload
from offmoe.kernels.reference import ExpertMath, Multiply, experts_forward, one_token_forward
from offmoe.kernels.slot_kernels import SlotKernels
from offmoe.moe.dispatch import Assignment

# So few tokens are served by the kernels, whichever they have.
FEW_TOKENS = 16
# The reference is eleven launches an expert, some 55 us of the host's time, in which a card of 20 TFLOP/s computes a
# hundred rows of 4.7 million weights. Up to so many rows an expert, on average, the tiles' two launches a layer are
# less. By arithmetic: no GPU was at hand.
MANY_ROWS = 128


@dataclass(frozen=True, slots=True)
class Computed:
    """An expert in slot `slot`, held, and the rows that chose it."""

    slot: int
    weights: ExpertWeights
    assigned: list[Assignment]


class ExpertBackend(Protocol):
    """Computes rows of a layer."""

    def compute(
        self, layer_idx: int, math: ExpertMath, experts: list[Computed], x_TD: torch.Tensor, y_SD: torch.Tensor
    ) -> None:
        """Write y of every assigned row into `y_SD`."""


class TokenRows:
    """One token whose experts all have slots, by kernels that find the slots in a table on the device.

    So the host makes no index tensor and uploads nothing: 285 us of CPU time a layer of eight experts, and two copies.
    The table `slot_of_LE` is the one that the kernels were made with. An entry is written when its expert is next used
    and lies elsewhere than before, by a small kernel on the caller's stream, ahead of those that read it. What was
    evicted keeps its entry: nobody asks for it.
    """

    def __init__(self, kernels: SlotKernels, slot_of_LE: torch.Tensor) -> None:
        self._kernels, self._slot_of_LE = kernels, slot_of_LE
        self._written_LE = [[-1] * slot_of_LE.shape[1] for _ in range(len(slot_of_LE))]

    def serves(self, layer_idx: int) -> bool:
        """Whether the layer has such kernels."""
        return self._kernels.looks_up(layer_idx)

    def compute(
        self, layer_idx: int, slot_of: dict[int, int],
        x_1D: torch.Tensor, expert_ids_1K: torch.Tensor, weights_1K: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The experts' weighted sum (1, D), `slot_of` each expert that was chosen."""
        written_E = self._written_LE[layer_idx]
        for expert_idx, slot in slot_of.items():
            if written_E[expert_idx] != slot:
                self._slot_of_LE[layer_idx, expert_idx].fill_(slot)
                written_E[expert_idx] = slot
        return self._kernels.lookup_forward(layer_idx, x_1D, expert_ids_1K, weights_1K)


class ReferenceBackend:
    """Plain torch on views of the slots, on any device. `multiply`: products of several rows, as torch's `linear`."""

    def __init__(self, multiply: Multiply = torch.nn.functional.linear) -> None:
        self._multiply = multiply

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
                y_SD[assignment.choices_N] = experts_forward(
                    math, [(assignment.expert_idx, weights, x_ND)], multiply=self._multiply
                )


class KernelBackend:
    """Kernels that address weights by slot; `ReferenceBackend` where rows are so many that large products are faster.

    `one_path`: every row is rounded alike however many come in one call, which depends on what was cached. The kernels
    then serve single tokens only, whose rows they sum one by one: for several tokens they choose their tiles by the
    number of rows. Several tokens are computed by the reference, expert by expert.
    """

    def __init__(self, kernels: SlotKernels, *, one_path: bool = False) -> None:
        self._kernels, self._one_path = kernels, one_path
        self._reference = ReferenceBackend()

    def compute(
        self, layer_idx: int, math: ExpertMath, experts: list[Computed], x_TD: torch.Tensor, y_SD: torch.Tensor
    ) -> None:
        """All rows in one call of the kernels, where they serve."""
        if not self._serves(layer_idx, experts, num_tokens=x_TD.shape[0]):
            self._reference.compute(layer_idx, math, experts, x_TD, y_SD)
        elif self._one_path and math.post_norm is not None:  # torch sums a row by how many rows there are
            for expert in experts:
                self._compute(layer_idx, [expert], x_TD, y_SD)
        else:
            self._compute(layer_idx, experts, x_TD, y_SD)

    def _serves(self, layer_idx: int, experts: list[Computed], *, num_tokens: int) -> bool:
        """Whether the kernels compute these rows."""
        if self._one_path:
            return num_tokens == 1
        counts = [assignment.num_rows for expert in experts for assignment in expert.assigned]
        are_many = sum(counts) > MANY_ROWS * len(counts)
        return num_tokens <= FEW_TOKENS or (self._kernels.has_tiles(layer_idx) and not are_many)

    def _compute(self, layer_idx: int, experts: list[Computed], x_TD: torch.Tensor, y_SD: torch.Tensor) -> None:
        """One call of the kernels. Index tensors of many tokens stay where they are."""
        flat = [(expert, assignment) for expert in experts for assignment in expert.assigned]
        counts = torch.tensor([assignment.num_rows for _, assignment in flat])
        slot_N = torch.tensor([expert.slot for expert, _ in flat]).repeat_interleave(counts)
        expert_N = torch.tensor([assignment.expert_idx for _, assignment in flat]).repeat_interleave(counts)
        if x_TD.shape[0] == 1:
            token_N = torch.zeros(len(flat), dtype=torch.long)
            choices_N = upload(torch.tensor([assignment.choices_N for _, assignment in flat]), y_SD.device)
        else:
            token_N = torch.cat([tokens for _, a in flat if (tokens := a.tokens_N) is not None])
            choices_N = torch.cat([c for _, a in flat if isinstance(c := a.choices_N, torch.Tensor)])
        y_SD[choices_N] = self._kernels.rows_forward(layer_idx, x_TD, token_N, slot_N, expert_N)
