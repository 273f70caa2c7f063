"""The KV cache as a compiled step sees it: fixed shapes and addresses, the position in a tensor.

No memory of its own: its keys and values are views of the first `capacity` tokens of the buffers that kv_cache.py's
layers write eagerly, so that a step may run either way. transformers' StaticLayer counts tokens in each layer while it
runs; here one tensor, written before the step, says where the token goes: a step that failed half-way, or that is
repeated, leaves nothing to undo.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from offmoe.kv.cache import PreallocatedLayer, SlidingLayer


class UnsupportedCacheError(Exception):
    """A layer keeps state in a way that has no fixed shape here; the message names it."""


class StaticLayer(CacheLayerMixin):
    """Keys and values of the tokens `offset`, `offset` + 1, ... ; the next one belongs at `position`."""

    is_compileable = True

    def __init__(
        self, buffers: tuple[torch.Tensor, torch.Tensor], position: torch.Tensor, offset: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.keys, self.values = buffers
        self.position, self.offset = position, offset
        self.is_sliding, self.is_initialized = offset is not None, True
        for tensor in buffers:  # or CUDA graphs copy them
            torch._dynamo.mark_static_address(tensor)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the one new token's states at `position`; returns all that there is room for."""
        row = self.position if self.offset is None else self.position - self.offset
        self.keys.index_copy_(2, row.view(1), key_states)
        self.values.index_copy_(2, row.view(1), value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, torch.Tensor | int]:
        """(rows, token of the first row)."""
        return self.keys.shape[-2], 0 if self.offset is None else self.offset

    def get_seq_length(self) -> torch.Tensor:
        """Tokens before the step's, as a tensor, so that its value is no constant of the compiled step."""
        return self.position

    def get_max_length(self) -> int:
        """Rows."""
        return int(self.keys.shape[-2])


class StaticKv:
    """The first `capacity` tokens of an eager cache that has read a prompt, with fixed shapes.

    Raises UnsupportedCacheError for a cache with layers that have none.
    """

    def __init__(self, eager: DynamicCache, capacity: int) -> None:
        self.capacity = capacity
        self._eager = eager
        device = _device_of(eager)
        self.position = _static_scalar(device)
        self._sliding = [layer for layer in eager.layers if isinstance(layer, SlidingLayer)]
        self._offsets = {(layer.sliding_window, layer.room): _static_scalar(device) for layer in self._sliding}
        self.cache = Cache(layers=[self._static(layer) for layer in eager.layers])

    def _static(self, layer: object) -> object:
        if isinstance(layer, (PreallocatedLayer, SlidingLayer)) and layer.buffers is not None:
            keys, values = (buffer[..., : self.capacity, :] for buffer in layer.buffers)
            sliding = isinstance(layer, SlidingLayer)
            offset = self._offsets[layer.sliding_window, layer.room] if sliding else None
            return StaticLayer((keys, values), self.position, offset)
        return layer

    def seek(self, position: int) -> None:
        """The next step reads the token at `position`; those before it are in the buffers."""
        assert position < self.capacity, f"{position=} {self.capacity=}"
        self.position.fill_(position)
        for layer in self._sliding:
            layer.cumulative_length = position
            layer.make_room(1)
        for layer in self._sliding:
            self._offsets[layer.sliding_window, layer.room].fill_(layer.offset)

    def hand_back(self, length: int) -> None:
        """The eager cache takes over again: `length` tokens are in the buffers."""
        for layer in self._eager.layers:
            if isinstance(layer, (PreallocatedLayer, SlidingLayer)):
                layer.grow_to(length)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Within, a step may run. Afterwards it can be repeated, here or by the eager cache."""
        states = self._running_states()
        before = [state.clone() for state in states]
        try:
            yield
        finally:
            with torch.inference_mode():
                for state, old in zip(states, before, strict=True):
                    state.copy_(old)

    def _running_states(self) -> list[torch.Tensor]:
        """States that a step reads and overwrites. Keys and values are not: a step repeated writes the same row."""
        return [
            state
            for layer in self.cache.layers
            if isinstance(layer, LinearAttentionLayer)
            for states in (layer.conv_states, layer.recurrent_states)
            for state in states.values()
            if state is not None
        ]


def _device_of(cache: DynamicCache) -> torch.device:
    device = None
    for layer in cache.layers:
        if isinstance(layer, (PreallocatedLayer, SlidingLayer)) and layer.buffers is not None:
            device = layer.buffers[0].device
        # By name: transformers 5.17 has no such class.
        elif type(layer) is not LinearAttentionLayer and type(layer).__name__ != "DummyLayer":
            raise UnsupportedCacheError(f"a {type(layer).__name__} of the KV cache has no fixed shape")
    if device is None:
        raise UnsupportedCacheError("no layer of the KV cache counts tokens")
    return device


def _static_scalar(device: torch.device) -> torch.Tensor:
    scalar = torch.zeros((), dtype=torch.long, device=device)
    torch._dynamo.mark_static_address(scalar)
    return scalar
