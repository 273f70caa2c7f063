"""Routers' choices, call by call: kept for a while in memory always, and in a file when asked for.

One event is one layer call: all its tokens' choices at once, since a cache serves them at once. Shapes: T tokens,
K experts a token; ids are flat, T * K of them, token by token.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

# Stands for a choice that is none: padding. So the most experts a layer may have are 65,535.
PADDING = 0xFFFF
MAX_HALF = 65504.0
# About 15 bytes each in the ring: 2 MiB, some hundred tokens of a large model.
RING_CHOICES = 1 << 17


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One layer call. `ids`: (T * K,), PADDING where a token has no expert. `weights_f16`: as many little-endian half
    floats, or None. `guesses`: by distance in layers, what was expected of this call, the surest first.
    """

    layer_idx: int
    top_k: int
    is_prefill: bool
    ids: Sequence[int]
    weights_f16: bytes | None = None
    guesses: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.ids) // self.top_k

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Weights that the router gave each choice, (T * K,), rounded to half precision."""
        if self.weights_f16 is None:
            return None
        return struct.unpack(f"<{len(self.weights_f16) // 2}e", self.weights_f16)

    def rows_by_expert(self) -> dict[int, int]:
        """Expert -> choices of it, in order of expert id, as the executor serves them."""
        rows = Counter(self.ids)
        rows.pop(PADDING, None)
        return dict(sorted(rows.items()))


class EventSink(Protocol):
    """Sink of events while a trace is recorded (trace/file.py)."""

    def write(self, event: TraceEvent) -> None:
        """One layer call."""

    def begin_prompt(self, num_tokens: int) -> None:
        """Begin another prompt."""


class Recorder:
    """Told of every layer call; keeps the last `ring_choices` choices, and hands all to `sink` while there is one.

    Used by the thread that runs the model. Without a sink a call of `record` takes a quarter of a microsecond.
    `reading_prompt`: calls of one token are part of a prompt too. `is_paused`: calls are not noted.
    """

    def __init__(self, ring_choices: int = RING_CHOICES) -> None:
        self._ring: deque[tuple[int, int, bool, Sequence[int]]] = deque()
        self._room, self._most = ring_choices, ring_choices
        self._guesses: dict[int, dict[int, tuple[int, ...]]] = {}
        self.sink: EventSink | None = None
        self.is_paused = False
        self.reading_prompt = False

    def __repr__(self) -> str:
        return f"<Recorder [{len(self._ring)} calls, {'recording' if self.sink else 'ring only'}]>"

    def record(self, layer_idx: int, top_k: int, ids: Sequence[int], weights: Any = None) -> None:
        """A layer call: its flat `ids`, every one below PADDING, or PADDING (`flat_ids`).

        `weights`: a tensor of as many numbers; it is read, which may wait for a device, only while there is a sink.
        """
        if self.is_paused:
            return
        is_prefill = self.reading_prompt or len(ids) > top_k
        self._ring.append((layer_idx, top_k, is_prefill, ids))
        self._room -= len(ids)
        while self._room < 0:
            self._room += len(self._ring.popleft()[3])
        if self.sink is not None:
            guesses = self._guesses.pop(layer_idx, {})
            halves = None if weights is None else _halves(weights.flatten().tolist())
            self.sink.write(TraceEvent(layer_idx, top_k, is_prefill, ids, halves, {} if is_prefill else guesses))

    def begin_prompt(self, num_tokens: int) -> None:
        """Begin a prompt, which lasts until `reading_prompt` is set to False, of so many tokens."""
        self.reading_prompt = True
        self.forget_guesses()
        if self.sink is not None:
            self.sink.begin_prompt(num_tokens)

    def guess(self, layer_idx: int, distance: int, ids: Iterable[int]) -> None:
        """The next call of the layer was expected, `distance` layers before it, to choose `ids`, the surest first."""
        if self.sink is not None:
            self._guesses.setdefault(layer_idx, {})[distance] = tuple(ids)

    def forget_guesses(self) -> None:
        """A pass was broken off, or recording begins."""
        self._guesses.clear()

    def recent(self) -> list[TraceEvent]:
        """Events in the ring, the oldest first. Between two calls of `record`."""
        return [TraceEvent(layer_idx, top_k, prefill, ids) for layer_idx, top_k, prefill, ids in self._ring]

    def latest(self, num_calls: int) -> list[TraceEvent]:
        """The last `num_calls` events in the ring, the newest first. Between two calls of `record`."""
        calls = islice(reversed(self._ring), num_calls)
        return [TraceEvent(layer_idx, top_k, prefill, ids) for layer_idx, top_k, prefill, ids in calls]


def flat_ids(ids: Iterable[int], num_experts: int) -> array[int]:
    """Ids as two bytes each; whatever is outside [0, num_experts) is PADDING."""
    return array("H", [idx if 0 <= idx < num_experts else PADDING for idx in ids])


def _halves(weights: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(weights)}e", *(min(MAX_HALF, max(-MAX_HALF, weight)) for weight in weights))
