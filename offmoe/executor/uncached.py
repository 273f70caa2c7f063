"""The oracle of the cache: every expert read from disk for every use, computed by the reference, nothing kept."""

from __future__ import annotations

import torch

from offmoe.base.keys import ExpertKey
from offmoe.checkpoint.expert_index import BUFFERED_ALIGN_BYTES, ExpertIndex, plan_read
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.executor.dispatch import dispatch
from offmoe.formats.dense import view_expert, writable_bytes
from offmoe.kernels.reference import ExpertMath, combine_rows, experts_forward


class UncachedExecutor:
    """Runs layers as Executor does, without cache, threads or direct reads."""

    def __init__(self, index: ExpertIndex, files: list[ShardFile]) -> None:
        self._index, self._files = index, files

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
            x_ND = x_TD if assignment.tokens_N is None else x_TD[assignment.tokens_N]
            y_SD[assignment.choices_N] = experts_forward(math, [(assignment.expert_idx, weights, x_ND)])
        return combine_rows(y_SD, weights_TK, x_TD.dtype)
