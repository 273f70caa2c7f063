"""Log probabilities of tokens by the model's own logits, before any sampling option acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from offmoe.sampling.params import Chooser


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log probability of a token at one place of a reply, and its rank: 1 for the likeliest token."""

    logprob: float
    rank: int


# Of one place: the chosen token first, then the likeliest ones in their order.
TokenLogprobs: TypeAlias = dict[int, Logprob]


class LogprobRecorder:
    """A chooser that keeps log probabilities of the token that `choose` takes, and of the `num_top` likeliest."""

    def __init__(self, choose: Chooser, num_top: int) -> None:
        self._choose, self._num_top = choose, num_top
        self._latest: TokenLogprobs = {}

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """The id that `choose` takes for ids (1, S) and logits (1, V)."""
        token_id = self._choose(ids, logits)
        self._latest = token_logprobs(logits[0], token_id, self._num_top)
        return token_id

    def take(self) -> TokenLogprobs:
        """Record of the last token; empty for a token that was not chosen (a forced one)."""
        latest, self._latest = self._latest, {}
        return latest


def token_logprobs(logits_V: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Log probabilities of `token_id` and of the `num_top` largest of `logits_V`."""
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    chosen = logprobs_V[token_id]
    found = {token_id: Logprob(float(chosen), 1 + int((logprobs_V > chosen).sum()))}
    top = logprobs_V.topk(min(num_top, len(logprobs_V)))
    for rank, (top_id, value) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True), start=1):
        found.setdefault(top_id, Logprob(value, rank))
    return found
