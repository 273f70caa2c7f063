"""Log probabilities of a prompt's own tokens, without a matrix of logits for all of them.

The model's forward gives the last logits only. Here its head is given the hidden states of all tokens, a few rows at a
time, and what the model does with logits behind its head (a scale, a soft cap) is done to them as well. Whether that is
all is asked of the model: the last row must come out as the forward's own, bit by bit. Where it does not, the prompt is
read again in short pieces, whose logits the model itself writes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from offmoe.hf.door import PreTrainedModel
from offmoe.sampling.logprobs import TokenLogprobs, token_logprobs

# Rows of logits that are alive at once, at most; few enough for any workspace, enough for a product of many rows.
MOST_ROWS = 64
_COPIES = 4  # a row in the model's type, in float32, its logarithms, and a sorted part


class HeadUnknownError(Exception):
    """The model does something with its logits that is not known here."""


class PromptScorer:
    """Collects `found`: for each token of a prompt its log probability and those of the `num_top` likeliest ones.

    Of the first token, which nothing comes before, it has None.
    """

    def __init__(self, model: PreTrainedModel, num_top: int, *, workspace_bytes: int) -> None:
        self._model, self._num_top = model, num_top
        self._head: Any = model.get_output_embeddings()
        vocab_size = int(model.config.get_text_config().vocab_size)
        self.rows = max(1, min(MOST_ROWS, workspace_bytes // (_COPIES * 4 * vocab_size)))
        # Whether short pieces are read, for which the model writes out all logits.
        self.in_short_pieces = self._head is None
        self._finish: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._hidden: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        self.found: list[TokenLogprobs | None] = []

    def restart(self) -> None:
        """The prompt is read again, in short pieces."""
        self.in_short_pieces, self._last, self.found = True, None, []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within: the model's forward, whose head is to see the last row only."""
        if self.in_short_pieces:
            yield
            return

        def last_only(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self._hidden = args[0]
            return (args[0][:, -1:], *args[1:])

        hook = self._head.register_forward_pre_hook(last_only)
        try:
            yield
        finally:
            hook.remove()

    def score(self, ids: torch.Tensor, logits: torch.Tensor) -> None:
        """After the forward of ids (1, T), which gave logits (1, T or 1, V). Raises HeadUnknownError."""
        hidden, self._hidden = self._hidden, None
        first = self._last
        tokens: list[int] = ids[0].tolist()
        if first is None:
            self.found.append(None)
        else:
            self._add(first, tokens[0])
        if self.in_short_pieces:
            for row, token_id in zip(logits[0, :-1], tokens[1:], strict=True):
                self._add(row, token_id)
        else:
            if hidden is None or hidden.shape[1] != len(tokens):
                raise HeadUnknownError
            self._score_rows(hidden, tokens, logits[0, -1])
        self._last = logits[0, -1].clone()

    def _score_rows(self, hidden: torch.Tensor, tokens: list[int], last_V: torch.Tensor) -> None:
        if self._finish is None:
            self._finish = self._find_finish(self._head(hidden[:, -1:])[0, -1], last_V)
        for begin in range(0, len(tokens) - 1, self.rows):
            end = min(begin + self.rows, len(tokens) - 1)
            for row, token_id in zip(
                self._finish(self._head(hidden[:, begin:end])[0]), tokens[begin + 1 : end + 1], strict=True
            ):
                self._add(row, token_id)

    def _add(self, logits_V: torch.Tensor, token_id: int) -> None:
        self.found.append(token_logprobs(logits_V, token_id, self._num_top))

    def _find_finish(self, raw_V: torch.Tensor, last_V: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The model's way from the head's numbers to logits, of those that families have."""
        config: Any = self._model.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)
        divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
        ways: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda logits: logits, lambda logits: logits.float()]
        if divisor:
            ways.append(lambda logits: logits / divisor)
        if factor:
            ways.append(lambda logits: logits * factor)
        if cap:
            ways.append(lambda logits: (logits / cap).tanh() * cap)
        for way in ways:
            if torch.equal(way(raw_V).float(), last_V.float()):
                return way
        raise HeadUnknownError
