"""The KV cache from one call to the next: a prompt that begins like the last one is read from where it differs.

What is reused are states that were computed for exactly these ids. A fresh reading of the same prompt cuts it
elsewhere, which rounds differently in 16 bits, as any other `prefill_chunk` does; in float32 the ids are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from offmoe.hf.lengths import longest_with_same_cos_sin
from offmoe.kv.cache import PreallocatedLayer, SlidingLayer


class PrefixCache:
    """One KV cache for all calls of an engine, and the ids whose states it holds.

    Order of a call: `begin`, then within `guarded` the rest of the prompt; what was appended in all layers is added to
    `ids`. Not for two calls at once. `num_reused` and `num_prefilled` are totals in tokens. `turns_at`: the length from
    which on all angles differ from those of shorter texts, if there is one.
    """

    def __init__(
        self, model: PreTrainedModel, make_cache: Callable[[], DynamicCache | None], *, divisible: bool
    ) -> None:
        """`divisible`: the model gives the same result when a prompt comes in pieces; otherwise nothing is reused."""
        self._make_cache = make_cache
        self._divisible = divisible and not model.config.is_encoder_decoder
        # Beyond it all angles change; states of the first tokens are then of one length or the other.
        self._longest = longest_with_same_cos_sin(model)
        self.turns_at = None if self._longest is None else self._longest + 1
        self._num_seen = 0  # tokens that were held at once, since the cache was empty
        self.cache: DynamicCache | None = None
        self.ids: list[int] = []
        self.logits: torch.Tensor | None = None
        self._num_prompt = 0
        self._ends: torch.Tensor | None = None
        self.num_reused = self.num_prefilled = 0

    def begin(self, ids: Sequence[int], *, reuse: bool | None) -> int:
        """Number of `ids` that the cache holds now, the others being dropped from it; it is not settled before.

        `reuse`: True takes the longest common prefix, False nothing, None only what a prompt that continues the last
        one has of it. Where all of `ids` were the last prompt, `logits` are what followed it, else None.
        """
        self._num_seen = max(self._num_seen, len(self.ids))
        same = self._common(ids) if self._divisible and self.cache is not None and reuse is not False else 0
        if reuse is None and not (len(ids) > self._num_prompt <= same):
            same = 0
        repeated = same == len(ids) == self._num_prompt and self._ends is not None
        same = same if repeated else min(same, len(ids) - 1)
        if self._longest is not None and max(len(ids), self._num_seen) > self._longest:
            same = 0
        if same == 0 or not self._cut(same):
            same, repeated = 0, False
            self._empty()
        del self.ids[same:]
        self.logits = self._ends if repeated else None
        self._num_prompt = len(ids)
        if not repeated:
            self._ends = None
        self.num_reused += same
        self.num_prefilled += len(ids) - same
        return same

    def prompt_ends(self, logits: torch.Tensor) -> None:
        """Keep the logits that followed the prompt, (1, V): a repetition of it starts from there."""
        self._ends = logits.clone()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Within: tokens are appended. What breaks off one half-way leaves the cache with the whole ones, or empty."""
        try:
            yield
        except GeneratorExit:  # between two tokens
            raise
        except BaseException:
            # A window may have been moved half-way; full attention only ever writes behind what it holds.
            layers = self.cache.layers if self.cache is not None else []
            if not all(isinstance(layer, PreallocatedLayer) for layer in layers) or not self._cut_all_to(len(self.ids)):
                self.forget()
            raise

    def forget(self) -> None:
        """Give the memory back."""
        self.cache = self.logits = self._ends = None
        self.ids.clear()
        self._num_prompt = 0

    def _common(self, ids: Sequence[int]) -> int:
        pairs = zip(self.ids, ids, strict=False)
        return next((i for i, (held, new) in enumerate(pairs) if held != new), min(len(self.ids), len(ids)))

    def _cut(self, length: int) -> bool:
        """Hold `length` tokens; False, and nothing is changed, where a layer cannot go back that far."""
        return length == len(self.ids) or self._cut_all_to(length)

    @torch.inference_mode()
    def _cut_all_to(self, length: int) -> bool:
        layers: list[Any] = [] if self.cache is None else list(self.cache.layers)
        if length == 0 or not layers or not all(_reaches(layer, length) for layer in layers):
            return False
        for layer in layers:
            if not _is_stateless(layer):
                layer.grow_to(length)
        return True

    @torch.inference_mode()
    def _empty(self) -> None:
        """The buffers stay where all layers are ours: others may not know how to begin again."""
        layers: list[Any] = [] if self.cache is None else list(self.cache.layers)
        if layers and all(isinstance(layer, (PreallocatedLayer, SlidingLayer)) for layer in layers):
            for layer in layers:
                layer.reset()
        else:
            self.cache = None
            self.cache = self._make_cache()
        self.ids.clear()
        self._num_seen = 0


def _reaches(layer: Any, length: int) -> bool:
    """The states of the first `length` tokens, as far back as the next one sees, are still in `layer`."""
    if isinstance(layer, PreallocatedLayer):
        return layer.buffers is not None
    if isinstance(layer, SlidingLayer):
        first = max(0, length - layer.sliding_window + 1)
        return layer.buffers is not None and not layer.record_past and layer.offset <= first
    return _is_stateless(layer)


def _is_stateless(layer: Any) -> bool:
    return type(layer).__name__ == "DummyLayer"  # by name: transformers 5.17 has no such class
