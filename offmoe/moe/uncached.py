"""The oracle of the cache: every expert read from disk for every use, nothing kept.

Rows are computed by whoever computes those of the cached run (`rows`), so that both give the same numbers; where that
is a device's kernels, which address slots, by the reference.
"""

from __future__ import annotations

import torch

from offmoe.checkpoint.expert_index import BUFFERED_ALIGN_BYTES, ExpertIndex, plan_read
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.core.keys import ExpertKey
from offmoe.formats.dense import view_expert, writable_bytes
from offmoe.kernels.reference import ExpertMath, combine_rows
from offmoe.moe.backends import Computed, ExpertBackend, ReferenceBackend
from offmoe.moe.dispatch import dispatch


class UncachedExecutor:
    """Runs layers as Executor does, without cache, threads or direct reads."""

    def __init__(self, index: ExpertIndex, files: list[ShardFile], rows: ExpertBackend | None = None) -> None:
        self._index, self._files, self._rows = index, files, rows or ReferenceBackend()

    def run_layer(
        self, layer_idx: int, math: ExpertMath, num_experts: int,
        x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The experts' weighted sum, (T, D) in x's dtype."""
        y_SD = torch.zeros(expert_ids_TK.numel(), x_TD.shape[-1], dtype=math.dtype, device=x_TD.device)
        for assignment in dispatch(expert_ids_TK.cpu(), num_experts, device=x_TD.device):
            layer = self._index.layers[layer_idx]
            plan = plan_read(
                self._index.spans(ExpertKey(layer_idx, assignment.expert_idx)), align_bytes=BUFFERED_ALIGN_BYTES
            )
            slot = torch.empty(plan.slot_bytes, dtype=torch.uint8)
            view = writable_bytes(slot)
            for run in plan.runs:
                part = view[run.slot_offset : run.slot_offset + run.num_bytes]
                self._files[run.file_idx].read_into(part, run.start, need_bytes=run.need_bytes)
            weights = view_expert(layer, slot.to(x_TD.device), plan.source_offsets)
            self._rows.compute(layer_idx, math, [Computed(-1, weights, [assignment])], x_TD, y_SD)
        return combine_rows(y_SD, weights_TK, x_TD.dtype)
