"""A KV cache whose attention layers write in place, into memory that is allocated once.

transformers' dynamic layers concatenate at every step: one layer's whole cache is copied for each token, and two copies
exist at once. Here a token is written in place: full-attention layers hold `context_length` tokens, sliding ones twice
their window. All other layer kinds (linear attention, ...) stay transformers' own. `static_cache.py` shows the same
memory to a compiled step.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from offmoe.hf.internals import brings_own_cache

Buffers = tuple[torch.Tensor, torch.Tensor]
# A long piece of a prompt leaves so many rows more in a window than the next token sees.
_ROWS_BEFORE = 64


def _allocate(keys: torch.Tensor, values: torch.Tensor, room: int) -> Buffers:
    """Room for `room` tokens of such states. Zeros: a static step multiplies rows that it masks by 0, and NaN stays.

    A latent and its rotated key lie side by side: attention reads them as one.
    """
    widths = [states.shape[-1] for states in (keys, values)]
    if keys.shape[:-1] == values.shape[:-1] and keys.shape[-3] == 1 and widths[0] != widths[1]:
        both = keys.new_zeros((*keys.shape[:-2], room, sum(widths)))
        return both[..., : widths[0]], both[..., widths[0] :]
    new_keys, new_values = (states.new_zeros((*states.shape[:-2], room, states.shape[-1])) for states in (keys, values))
    return new_keys, new_values


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, (batch, heads, capacity, head width), of which the first `length` are valid.

    `keys` and `values` are views of those, made when somebody asks: kernels that know the buffers need none.
    """

    is_initialized: bool

    def __init__(self, capacity: int) -> None:
        self._length, self._is_stale = 0, False
        self._keys: Any = None
        self._values: Any = None
        super().__init__()
        self._capacity = capacity
        self.buffers: Buffers | None = None

    @property
    def keys(self) -> Any:
        """The valid ones; None before the first."""
        self._make_views()
        return self._keys

    @keys.setter
    def keys(self, states: Any) -> None:
        self._make_views()
        self._keys = states
        self._length = 0 if states is None or states.dim() < 2 else states.shape[-2]

    @property
    def values(self) -> Any:
        """The valid ones; None before the first."""
        self._make_views()
        return self._values

    @values.setter
    def values(self, states: Any) -> None:
        self._make_views()
        self._values = states

    def _make_views(self) -> None:
        if self._is_stale:
            assert self.buffers is not None
            self._keys, self._values = (buffer[..., : self._length, :] for buffer in self.buffers)
            self._is_stale = False

    def get_seq_length(self) -> int:
        """Valid tokens."""
        return self._length if self.is_initialized else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (batch, heads, new, width) states in place and return all valid ones, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.buffers is None:
            self.buffers = _allocate(key_states, value_states, self._capacity)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        assert end <= self._capacity, f"{end=} {self._capacity=}"
        keys, values = self.buffers
        keys[..., begin:end, :] = key_states
        values[..., begin:end, :] = value_states
        self.grow_to(end)
        return self.keys, self.values

    def open_row(self) -> Buffers:
        """One token more: all rows that it sees, the last of which the caller writes, (batch, heads, rows, width)."""
        self.grow_to(self._length + 1)
        return self.keys, self.values

    def last_rows(self) -> Buffers:
        """All rows that the token appended last sees, itself the last."""
        return self.keys, self.values

    def count_row(self) -> int:
        """Count a row that was written, for a caller that knows the buffers; returns how many rows there are now."""
        self._length, self._is_stale = self._length + 1, True
        return self._length

    @property
    def can_open(self) -> bool:
        """There are rows already, and room for one more."""
        return self.buffers is not None and 0 < self._length < self._capacity

    def grow_to(self, length: int) -> None:
        """Others write tokens into the buffers: `length` of them are valid now."""
        self._length, self._is_stale = length, True

    def put(self, begin: int, states: Buffers, *, device: torch.device) -> None:
        """Hold `states` behind the first `begin` tokens, and nothing behind those."""
        if not self.is_initialized:
            self.lazy_initialization(*(some[..., :1, :].to(device) for some in states))
        if self.buffers is None:
            self.buffers = _allocate(states[0].to(device), states[1].to(device), self._capacity)
        end = begin + states[0].shape[-2]
        for buffer, some in zip(self.buffers, states, strict=True):
            buffer[..., begin:end, :] = some
        self.grow_to(end)

    def reset(self) -> None:
        """Forget the tokens; the buffers stay."""
        self.keys = self.values = None
        self.is_initialized = False

    def bytes_at(self, capacity: int) -> int:
        """Bytes of the buffers if they had room for `capacity` tokens."""
        return sum(b.nbytes for b in self.buffers or ()) // self._capacity * capacity


class SlidingLayer(DynamicSlidingWindowLayer):
    """The last tokens of a layer that looks back `sliding_window` tokens; buffer row i holds token `offset` + i.

    When the buffer is full, the window moves to its beginning: one copy of a window every window tokens.
    """

    keys: Any
    values: Any
    is_initialized: bool
    sliding_window: int

    def __init__(self, sliding_window: int, capacity: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.room = min(capacity, 2 * sliding_window)
        self.offset = 0
        self.buffers: Buffers | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (batch, heads, new, width) states; returns them after the window - 1 tokens before them."""
        if self.record_past:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.buffers is None:
            self.buffers = _allocate(key_states, value_states, self.room)
        num_new = key_states.shape[-2]
        begin = max(0, self.cumulative_length - self.sliding_window + 1)
        end = self.cumulative_length + num_new
        if num_new <= self.room - self.sliding_window + 1 or end - self.offset <= self.room:
            self.make_room(num_new)
            self._write(self.cumulative_length, (key_states, value_states))
            states = self._rows(begin, end)
        else:  # a long piece of the prompt: it passes by, and its last tokens stay
            before = self._rows(begin, self.cumulative_length)
            states = (torch.cat([before[0], key_states], dim=-2), torch.cat([before[1], value_states], dim=-2))
            # Some more than the next token sees: a prompt may be gone back in to the last border of blocks.
            num_kept = min(end - begin, self.room, self.sliding_window - 1 + _ROWS_BEFORE)
            self.offset = end - num_kept
            self._write(self.offset, tuple(s.narrow(-2, s.shape[-2] - num_kept, num_kept) for s in states))
        self.grow_to(end)
        return states

    def make_room(self, num_new: int) -> None:
        """Let `num_new` more tokens fit behind those that the window still sees."""
        if self.cumulative_length + num_new - self.offset <= self.room:
            return
        begin = self.cumulative_length - self.sliding_window + 1
        kept = tuple(states.clone() for states in self._rows(begin, self.cumulative_length))
        self.offset = begin
        self._write(begin, kept)

    def open_row(self) -> Buffers:
        """See PreallocatedLayer: a token sees itself and `sliding_window` - 1 tokens before it."""
        self.make_room(1)
        self.grow_to(self.cumulative_length + 1)
        return self.last_rows()

    def last_rows(self) -> Buffers:
        """See PreallocatedLayer."""
        end = self.cumulative_length
        return self._rows(max(0, end - self.sliding_window), end)

    @property
    def can_open(self) -> bool:
        """There are rows already."""
        return self.buffers is not None and self.is_initialized and not self.record_past

    def grow_to(self, length: int) -> None:
        """The buffers hold the tokens before `length` now, as far back as the window sees."""
        self.cumulative_length = length
        self.keys, self.values = self._rows(max(0, length - self.sliding_window + 1), length)

    def rows_at(self, length: int) -> Buffers | None:
        """All rows that a token behind `length` others sees of them; None where some are gone."""
        begin = max(0, length - self.sliding_window + 1)
        if not self.can_open or begin < self.offset or length > self.cumulative_length:
            return None
        return self._rows(begin, length)

    def put(self, length: int, states: Buffers, *, device: torch.device) -> None:
        """See `refill`, for a layer that may be empty yet."""
        if not self.is_initialized:
            self.lazy_initialization(*(some[..., :1, :].to(device) for some in states))
        if self.buffers is None:
            self.buffers = _allocate(states[0].to(device), states[1].to(device), self.room)
        self.refill(length, states)

    def refill(self, length: int, states: Buffers) -> None:
        """Hold `length` tokens, of which the last ones have `states`: all that the window sees."""
        self.offset = length - states[0].shape[-2]
        self._write(self.offset, states)
        self.grow_to(length)

    def reset(self) -> None:
        """Forget the tokens; the buffers stay."""
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length, self.offset = False, 0, 0

    def bytes_at(self, capacity: int) -> int:
        """Bytes of the buffers if they were made for `capacity` tokens."""
        return sum(b.nbytes for b in self.buffers or ()) // self.room * min(capacity, 2 * self.sliding_window)

    def _rows(self, begin: int, end: int) -> Buffers:
        assert self.buffers is not None
        keys, values = (b[..., begin - self.offset : end - self.offset, :] for b in self.buffers)
        return keys, values

    def _write(self, begin: int, states: tuple[torch.Tensor, ...]) -> None:
        for rows, new in zip(self._rows(begin, begin + states[0].shape[-2]), states, strict=True):
            rows.copy_(new)


def make_kv_cache(model: PreTrainedModel, capacity: int) -> DynamicCache | None:
    """An empty cache for sequences of up to `capacity` tokens; None for a model that must make its own kind: also any
    encoder-decoder.
    """
    if model.config.is_encoder_decoder or brings_own_cache(model):
        return None
    cache = DynamicCache(config=model.config)
    cache.layers = [_in_place(layer, capacity) for layer in cache.layers]
    return cache


def can_append(layer: Any, rows: Any) -> bool:
    """Whether `rows`, the cache of a layer that `has_rows` or `has_states`, holds tokens and has room for one more."""
    if layer.has_rows:
        return isinstance(rows, (PreallocatedLayer, SlidingLayer)) and rows.can_open
    if not layer.has_states:
        return True
    return isinstance(rows, LinearAttentionLayer) and rows.has_previous_state[0] and not rows.record_past


def _in_place(layer: Any, capacity: int) -> Any:
    if type(layer) is DynamicLayer:
        return PreallocatedLayer(capacity)
    if type(layer) is DynamicSlidingWindowLayer:
        return SlidingLayer(layer.sliding_window, capacity)
    return layer
