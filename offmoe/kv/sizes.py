"""Bytes that a KV cache will take when it is full."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import DynamicCache

from offmoe.kv.cache import PreallocatedLayer, SlidingLayer


def kv_bytes(cache: DynamicCache, num_tokens: int, capacity: int) -> int:
    """Bytes that `cache`, now holding `num_tokens` tokens of one sequence, will take at `capacity` tokens.

    Counts every tensor that it holds; those with a dimension of `num_tokens` are taken to grow with the sequence, and
    twice, since a layer that concatenates has its old and its new copy for a moment.
    """
    total = 0
    for layer in cache.layers:
        if isinstance(layer, (PreallocatedLayer, SlidingLayer)):
            total += layer.bytes_at(capacity)
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
