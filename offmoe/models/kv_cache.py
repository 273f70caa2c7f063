"""A KV cache whose full-attention layers are allocated once, for `context_length` tokens.

transformers' DynamicLayer concatenates at every step: one layer's whole cache is copied for each token, and two copies
exist at once. Here a token is written in place. All other layer kinds (sliding window, linear attention, ...) stay
transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from offmoe.models.transformers_internals import brings_own_cache


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, (batch, heads, capacity, head width), of which the first `length` are valid."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (batch, heads, new, width) states in place and return all valid ones, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._buffers is None:
            self._buffers = tuple(  # type: ignore[assignment]
                states.new_empty((*states.shape[:-2], self._capacity, states.shape[-1]))
                for states in (key_states, value_states)
            )
        assert self._buffers is not None
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        assert end <= self._capacity, f"{end=} {self._capacity=}"
        keys, values = self._buffers
        keys[..., begin:end, :] = key_states
        values[..., begin:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values


def make_kv_cache(model: PreTrainedModel, capacity: int) -> DynamicCache | None:
    """An empty cache for sequences of up to `capacity` tokens; None for a model that must make its own kind."""
    if brings_own_cache(model):
        return None
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def kv_bytes(cache: DynamicCache, num_tokens: int, capacity: int) -> int:
    """Bytes that `cache`, now holding `num_tokens` tokens of one sequence, will take at `capacity` tokens.

    Counts every tensor that it holds; those with a dimension of `num_tokens` are taken to grow with the sequence, and
    twice, since a layer that concatenates has its old and its new copy for a moment.
    """
    total = 0
    for layer in cache.layers:
        if isinstance(layer, PreallocatedLayer):
            if layer.keys is not None and layer.values is not None:
                total += (layer.keys.nbytes + layer.values.nbytes) // num_tokens * capacity
            continue
        limit = min(capacity, int(getattr(layer, "sliding_window", 0) or capacity))
        for tensor in _tensors(list(vars(layer).values())):
            total += 2 * tensor.nbytes // num_tokens * limit if num_tokens in tensor.shape[1:] else tensor.nbytes
    return total + sum(tensor.nbytes for tensor in _tensors(getattr(cache, "linear_cache", None)))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
