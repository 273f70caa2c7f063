"""What rounded activations cost in quality: perplexity and KL divergence against the same engine without rounding.

Shapes: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from offmoe.generation.engine import Engine
from offmoe.generation.finite import is_finite, non_finite_error
from offmoe.report.perplexity import ROWS, Perplexity, windows

# Of the model's own text, where no other is given.
OWN_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """`kl_nats`: sum over all tokens of KL(exact || lossy); `largest_kl` of one token; `same` best next tokens."""

    exact: Perplexity
    lossy: Perplexity
    kl_nats: float
    largest_kl: float
    same: int

    @property
    def change(self) -> float:
        """Of the perplexity: 0.01 is 1% more."""
        return self.lossy.value / self.exact.value - 1

    @property
    def kl_per_token(self) -> float:
        """Nats, the mean over the tokens."""
        return self.kl_nats / self.exact.num_tokens

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens": self.exact.num_tokens, "perplexity_exact": self.exact.value, "perplexity": self.lossy.value,
            "kl_nats_per_token": self.kl_per_token, "largest_kl_nats": self.largest_kl,
            "same_best_token": self.same / self.exact.num_tokens,
        }  # fmt: skip

    def line(self) -> str:
        """For people."""
        return (
            f"perplexity {self.exact.value:.4f} -> {self.lossy.value:.4f} ({100 * self.change:+.2f}%), "
            f"KL {self.kl_per_token:.2g} nats a token (largest {self.largest_kl:.2g}), the same best next token for "
            f"{self.same} of {self.exact.num_tokens}"
        )


def own_text(engine: Engine, ids: Sequence[int], num_new: int = OWN_TOKENS) -> list[int]:
    """`ids`, and what the model, without rounding, writes after them at temperature 1."""
    num_new = min(num_new, engine.context_length - len(ids))
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    with engine.exact_activations():
        reply = engine.generate(list(ids), max_new_tokens=num_new, seed=1, ignore_end=True, **options)
    return [*ids, *reply.token_ids]


@torch.inference_mode()
def price(engine: Engine, ids: Sequence[int], progress: Callable[[int, int], None] = lambda done, total: None) -> Price:
    """Of `engine`, loaded with `fast_activations`, on `ids`, in the windows of `perplexity`.

    The logits of two windows are held besides the engine's budget. Raises UsageError for less than two ids.
    """
    nats, kl, largest, same, total = [0.0, 0.0], 0.0, 0.0, 0, len(ids) - 1
    for given_T, first, scored in windows(engine, ids):
        with engine.exact_activations():
            exact_TV = engine.model(input_ids=given_T[None], use_cache=False).logits[0]
        lossy_TV = engine.model(input_ids=given_T[None], use_cache=False).logits[0]
        for begin in range(first, len(given_T) - 1, ROWS):
            rows = slice(begin, min(begin + ROWS, len(given_T) - 1))
            if not is_finite(exact_TV[rows]):
                again = partial(engine.model, input_ids=given_T[None], use_cache=False)
                raise non_finite_error(engine.model, len(given_T), again)
            wanted_T1 = given_T[rows.start + 1 : rows.stop + 1, None]
            exact, lossy = (logits[rows].float().log_softmax(-1) for logits in (exact_TV, lossy_TV))
            kl_T = (exact.exp() * (exact - lossy)).sum(-1).clamp_min(0.0)
            nats = [sum_ - float(p.gather(1, wanted_T1).sum()) for sum_, p in zip(nats, (exact, lossy), strict=True)]
            kl, largest = kl + float(kl_T.sum()), max(largest, float(kl_T.max()))
            same += int((exact.argmax(-1) == lossy.argmax(-1)).sum())
        progress(scored, total)
    exact_loss, lossy_loss = (Perplexity(num_tokens=total, nats=part) for part in nats)
    return Price(exact=exact_loss, lossy=lossy_loss, kl_nats=kl, largest_kl=largest, same=same)
