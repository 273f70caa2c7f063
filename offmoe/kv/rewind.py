"""Putting a KV cache back to where it was: a chunk of the prompt that failed half-way has filled some layers of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from offmoe.kv.cache import PreallocatedLayer, SlidingLayer


@torch.inference_mode()
def remember(cache: DynamicCache | None) -> Callable[[], None]:
    """A function that puts `cache` back as it is now, to be called at most once.

    What is overwritten in place is copied: windows and running states, not the tokens of full attention. None is a
    cache that the model has not made yet.
    """
    if cache is None:
        return lambda: None
    rewinds = [_remember_layer(layer) for layer in cache.layers]
    others = {name: _copied(value) for name, value in vars(cache).items() if name != "layers"}

    @torch.inference_mode()
    def rewind() -> None:
        del cache.layers[len(rewinds) :]
        for rewind_layer in rewinds:
            rewind_layer()
        vars(cache).update(others)

    return rewind


def _remember_layer(layer: Any) -> Callable[[], None]:
    if isinstance(layer, (PreallocatedLayer, SlidingLayer)):
        length = layer.get_seq_length()
        if not length:
            return layer.reset
        if isinstance(layer, PreallocatedLayer):
            return lambda: layer.grow_to(length)
        window = (layer.keys.clone(), layer.values.clone())
        return lambda: layer.refill(length, window)
    # transformers' own layers: keys and values are replaced by longer ones, all else may be overwritten.
    state = {
        name: value if name in ("keys", "values") else _copied(value) for name, value in vars(layer).items()
    }  # fmt: skip

    def rewind() -> None:
        vars(layer).clear()
        vars(layer).update(state)

    return rewind


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value
