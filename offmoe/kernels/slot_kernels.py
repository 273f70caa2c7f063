"""Rows of experts computed from the slots of a slab: the contract, and plain torch, the reference of all kernels.

A row is (token, expert, slot). `expert` picks the bias, `slot` says where the weights lie; slot -1 means they are not
there, and the row comes out as zero. Shapes: N rows, T tokens, K experts a token, D model width.

Everything runs on the caller's current stream. The caller keeps slots from being refilled until what was launched here
has run: a mark of the copier after the call, given to the next copy into that slot, does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from offmoe.checkpoint.expert_index import MoeLayer
from offmoe.formats.dense import ExpertWeights, view_expert
from offmoe.formats.layout import layout_of
from offmoe.kernels.indices import upload
from offmoe.kernels.reference import ExpertMath, combine_rows, experts_forward, one_token_forward


class SlotKernels(Protocol):
    """A model's experts, computed where they lie."""

    reasons: dict[int, str]
    """Why a layer, or a part of its work, is computed by plain torch, by layer number; empty when none is."""

    def rows_forward(
        self, layer_idx: int, x_TD: torch.Tensor, token_N: torch.Tensor, slot_N: torch.Tensor, expert_N: torch.Tensor
    ) -> torch.Tensor:
        """y_ND in the layer's type. Indices are integers; on the host they are uploaded in one copy, without a wait."""

    def tokens_forward(
        self, layer_idx: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, slot_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """y_TD in x's type: every token's rows weighted and summed. Indices as above; a slot of -1 adds nothing."""

    def looks_up(self, layer_idx: int) -> bool:
        """Whether `lookup_forward` of the layer leaves the host alone: no wait, no index made, nothing uploaded."""

    def has_tiles(self, layer_idx: int) -> bool:
        """Whether many rows of an expert are computed together, in two launches a layer."""

    def lookup_forward(
        self, layer_idx: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """The same with slots from the table that the kernels were made with; ids outside the layer add nothing.

        Adds the number of rows whose expert has no slot to `missing_L[layer_idx]`. With Triton the host never waits.
        """


def look_up(
    slot_of_E: torch.Tensor, missing: torch.Tensor, expert_ids_TK: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """slot_TK from a table on the device, -1 where there is none; adds to `missing`, a view. The host does not wait."""
    known = (expert_ids_TK >= 0) & (expert_ids_TK < num_experts)
    slot_TK = slot_of_E[expert_ids_TK.clamp(0, num_experts - 1)].masked_fill(~known, -1)
    missing += (known & (slot_TK < 0)).sum()
    return slot_TK


class TorchSlotKernels:
    """Views of the slab and `kernels.reference`: bit for bit what it gives. Waits for indices that are on a device."""

    def __init__(
        self, layers: Sequence[MoeLayer], maths: Sequence[ExpertMath], slab: torch.Tensor, slot_bytes: int,
        *, slot_of_LE: torch.Tensor | None = None, missing_L: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.reasons: dict[int, str] = {}
        self._layers, self._maths = layers, maths
        self._layouts = [layout_of(layer) for layer in layers]
        self._slots = slab.view(-1)[: slab.numel() // slot_bytes * slot_bytes].view(-1, slot_bytes)
        self._slot_of_LE, self._missing_L = slot_of_LE, missing_L
        self._views: dict[int, tuple[int, ExpertWeights]] = {}

    def rows_forward(
        self, layer_idx: int, x_TD: torch.Tensor, token_N: torch.Tensor, slot_N: torch.Tensor, expert_N: torch.Tensor
    ) -> torch.Tensor:
        """Rows of one slot are one product."""
        math, rows_by_slot = self._maths[layer_idx], dict[int, list[int]]()
        tokens, slots, experts = token_N.tolist(), slot_N.tolist(), expert_N.tolist()
        for row, slot in enumerate(slots):
            if slot >= 0:
                rows_by_slot.setdefault(slot, []).append(row)
        y_ND = torch.zeros(len(slots), x_TD.shape[-1], dtype=math.dtype, device=x_TD.device)
        weights = {slot: self._weights(layer_idx, slot) for slot in rows_by_slot}
        if len(x_TD) == 1 and all(len(rows) == 1 for rows in rows_by_slot.values()) and rows_by_slot:
            chosen = [(experts[row], weights[slot]) for slot, (row,) in rows_by_slot.items()]
            y_KD = one_token_forward(math, chosen, x_TD)
            if len(chosen) == len(slots):
                return y_KD
            for y_D, (row,) in zip(y_KD, rows_by_slot.values(), strict=True):
                y_ND[row] = y_D
            return y_ND
        for slot, rows in rows_by_slot.items():
            x_ND = x_TD[upload(torch.tensor([tokens[row] for row in rows]), x_TD.device)]
            y_ND[upload(torch.tensor(rows), x_TD.device)] = experts_forward(
                math, [(experts[rows[0]], weights[slot], x_ND)]
            )
        return y_ND

    def tokens_forward(
        self, layer_idx: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, slot_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """`rows_forward`, then `combine_rows`."""
        token_N = torch.arange(expert_ids_TK.numel()) // expert_ids_TK.shape[1]
        y_ND = self.rows_forward(layer_idx, x_TD, token_N, slot_TK.reshape(-1), expert_ids_TK.reshape(-1))
        return combine_rows(y_ND, weights_TK, x_TD.dtype)

    def looks_up(self, layer_idx: int) -> bool:
        """Never: torch cannot address memory by a number on the device."""
        return False

    def has_tiles(self, layer_idx: int) -> bool:
        """Never: rows of a slot are a product of their own."""
        return False

    def lookup_forward(
        self, layer_idx: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Waits for the device."""
        assert self._slot_of_LE is not None and self._missing_L is not None, "made without a table"
        slot_TK = look_up(
            self._slot_of_LE[layer_idx], self._missing_L[layer_idx], expert_ids_TK, self._layers[layer_idx].num_experts
        )
        return self.tokens_forward(layer_idx, x_TD, expert_ids_TK, slot_TK, weights_TK)

    def _weights(self, layer_idx: int, slot: int) -> ExpertWeights:
        known = self._views.get(slot)
        if known is None or known[0] != layer_idx:
            views = view_expert(self._layers[layer_idx], self._slots[slot], self._layouts[layer_idx].offsets)
            known = self._views[slot] = (layer_idx, views)
        return known[1]
