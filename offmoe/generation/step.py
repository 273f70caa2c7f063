"""The innermost loop: prompt ids in, one new id after another out. Knows no text, no clock, no statistics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from offmoe.generation.sampling import Chooser


def generate_step(
    model: PreTrainedModel, prompt_ids: Sequence[int], choose: Chooser, *, cache: DynamicCache, chunk: int,
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[int]:  # fmt: skip
    """Yield token ids without end; the caller stops. The first id comes after the whole prompt was read.

    `cache` is empty or holds a prefix that `prompt_ids` continue, and receives every id but the one last yielded.
    The prompt goes through in pieces of `chunk`; `on_prefill(done, total)` is called after each. `choose` sees all ids
    of this call, (1, S), and the last logits, (1, V).
    """
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids = torch.tensor([list(prompt_ids)], dtype=torch.long)
    total = ids.shape[1]
    logits = torch.empty(0)
    for begin in range(0, total, chunk):
        piece = ids[:, begin : begin + chunk]
        logits = _last_logits(model, piece, cache, keep)
        on_prefill(begin + piece.shape[1], total)
    while True:
        token_id = choose(ids, logits)
        yield token_id
        new = torch.tensor([[token_id]], dtype=torch.long)
        ids = torch.cat([ids, new], dim=1)
        logits = _last_logits(model, new, cache, keep)


@torch.no_grad()
def _last_logits(
    model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache, keep: dict[str, int]
) -> torch.Tensor:
    output: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **keep).logits
    return output[:, -1]
