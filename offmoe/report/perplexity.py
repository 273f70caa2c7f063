"""Perplexity of a model on a text: by it a quantised model is compared with the one it was made of.

Shapes: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from offmoe.core.errors import UsageError
from offmoe.engine.engine import Engine
from offmoe.sampling.finite import non_finite_error

WINDOW = 512
# Rows of logits that exist in float32 at once.
ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """`nats` is the sum over `num_tokens` predicted tokens of -log p."""

    num_tokens: int
    nats: float

    @property
    def nats_per_token(self) -> float:
        """The mean loss."""
        return self.nats / self.num_tokens

    @property
    def value(self) -> float:
        """exp of the mean loss: the model is as unsure as if it chose among so many tokens."""
        return math.exp(min(self.nats_per_token, 700.0))


def perplexity(
    engine: Engine, ids: Sequence[int], progress: Callable[[int, int], None] = lambda done, total: None
) -> Perplexity:
    """Perplexity of `ids` in windows that overlap by half. `progress(done, total)` counts tokens.

    Each token is predicted once, and all but the first ones from at least half a window of text. The logits
    of one window are held besides the engine's budget. Raises UsageError for less than two ids, NonFiniteError for a
    model that computes none.
    """
    nats, total = 0.0, len(ids) - 1
    for given_T, first, scored in windows(engine, ids):
        nats += _loss(engine, given_T, first)
        progress(scored, total)
    return Perplexity(num_tokens=total, nats=nats)


def windows(engine: Engine, ids: Sequence[int]) -> Iterator[tuple[torch.Tensor, int, int]]:
    """(a window's ids, the first of them whose logits predict what no window before did, tokens predicted after it).

    Raises UsageError for less than two ids.
    """
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens; at least 2 are needed to predict one")
    window = max(2, min(WINDOW, engine.context_length, engine.plan.prefill_chunk))
    scored = 0
    for begin in range(0, len(ids), window // 2):
        given_T = torch.tensor(ids[begin : begin + window], device=engine.model.device)
        first, scored = scored - begin, begin + len(given_T) - 1
        yield given_T, first, scored
        if scored == len(ids) - 1:
            return


@torch.inference_mode()
def _loss(engine: Engine, given_T: torch.Tensor, first: int) -> float:
    logits_TV = engine.model(input_ids=given_T[None], use_cache=False).logits[0]
    total = 0.0
    for begin in range(first, len(given_T) - 1, ROWS):
        rows = slice(begin, min(begin + ROWS, len(given_T) - 1))
        wanted = given_T[rows.start + 1 : rows.stop + 1]
        total += torch.nn.functional.cross_entropy(logits_TV[rows].float(), wanted, reduction="sum").item()
    if not math.isfinite(total):
        raise non_finite_error(
            engine.model, len(given_T), lambda: engine.model(input_ids=given_T[None], use_cache=False)
        )  # fmt: skip
    return total
