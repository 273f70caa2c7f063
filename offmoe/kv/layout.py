"""Shapes and types of a model's KV cache, to hold a file against them before its numbers are used."""

from __future__ import annotations

from typing import Any

import torch

from offmoe.hf.door import DynamicCache
from offmoe.kv.cache import Buffers, PreallocatedLayer, SlidingLayer
from offmoe.kv.kept_blocks import KeptBlock
from offmoe.kv.states import is_stateless

CacheLayout = dict[int, Any]
_FULL, _WINDOW, _STATE = "full", "window", "state"


def cache_layout(cache: DynamicCache) -> CacheLayout:
    """Kind of each layer that holds something, with the shapes of its tensors but for the number of rows."""
    found: CacheLayout = {}
    for idx, layer in enumerate(cache.layers):
        if isinstance(layer, PreallocatedLayer) and layer.buffers is not None:
            found[idx] = (_FULL, _shapes(layer.buffers))
        elif isinstance(layer, SlidingLayer) and layer.buffers is not None:
            found[idx] = (_WINDOW, _shapes(layer.buffers), layer.sliding_window)
        elif not is_stateless(layer):
            found[idx] = (_STATE, _tree(vars(layer)))
    return found


def fits(block: KeptBlock, layout: CacheLayout, block_tokens: int) -> bool:
    """Whether a block is one of a cache of this layout."""
    full = [entry[1] for entry in layout.values() if entry[0] == _FULL]
    if not isinstance(block.rows, list) or len(block.rows) != len(full):
        return False
    rows = zip(block.rows, full, strict=True)
    if not all(_is_pair(pair) and _shapes(pair) == shapes and _num_rows(pair) == block_tokens for pair, shapes in rows):
        return False
    if block.states is None:
        return True
    if not isinstance(block.states, dict) or -1 in block.states:
        return False
    others = {idx: entry for idx, entry in layout.items() if entry[0] != _FULL}
    return block.states.keys() == others.keys() and all(
        _is_state(block.states[idx], entry) for idx, entry in others.items()
    )


def _is_state(state: Any, entry: tuple[Any, ...]) -> bool:
    if entry[0] == _STATE:
        return bool(_tree(state) == entry[1])
    return _is_pair(state) and _shapes(state) == entry[1] and _num_rows(state) < entry[2]


def _is_pair(value: Any) -> bool:
    is_two = isinstance(value, tuple) and len(value) == 2
    return is_two and all(isinstance(part, torch.Tensor) and part.dim() == 4 for part in value)


def _num_rows(pair: Buffers) -> int:
    keys, values = (part.shape[-2] for part in pair)
    return keys if keys == values else -1


def _shapes(pair: Buffers) -> tuple[Any, ...]:
    return tuple((*part.shape[:-2], part.shape[-1], part.dtype) for part in pair)


def _tree(value: Any) -> Any:
    """The form of nested values; of tensors the shape, but for rows that grow, and the type."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dim(), value.shape[-1:], value.dtype)
    if isinstance(value, dict):
        return {key: _tree(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tree(item) for item in value]
    return type(value).__name__
