"""Reads traces back. Files may be cut off, damaged or hostile: every count is checked before it is believed."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from offmoe.core.errors import TraceError
from offmoe.trace.file import (
    END_TAG,
    EVENT,
    EVENTS_TAG,
    FRAME,
    HAS_GUESSES,
    HAS_WEIGHTS,
    IS_PREFILL,
    MAGIC,
    MAX_EVENTS,
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    PREFIX,
    PROMPT_TAG,
    VERSION,
    Trace,
    TraceHeader,
    damaged,
    frame_check,
    is_padding_or_below,
)
from offmoe.trace.recorder import PADDING, TraceEvent

MAX_LAYERS = 10_000


class _CutOffError(Exception):
    """From here on nothing is whole; the message says why."""


def read_trace(path: Path, *, model_hash: str | None = None) -> Trace:
    """The trace in `path`, which must be of the model with `model_hash` if one is given.

    A file that was cut off or damaged gives what is whole before that, with a `note`. Raises TraceError where there is
    no event at all, the file is no trace, or the model is another.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header = _read_header(path, file, size)
            if model_hash is not None and header.model_hash != model_hash:
                raise TraceError(
                    f"{path} is a trace of another model ({header.model}, {header.model_hash[:12]}; this one is "
                    f"{model_hash[:12]}); record one with offmoe trace"
                )
            trace = _Reader(file, header, size).read()
    except OSError as error:
        raise TraceError(f"the trace {path} cannot be read: {error.strerror or error}") from None
    if not trace.events:
        why = f" ({trace.note})" if trace.note else ""
        raise TraceError(f"{path} is an empty trace: it has no routed token{why}; record it again with offmoe trace")
    return trace


def _read_header(path: Path, file: BinaryIO, size: int) -> TraceHeader:
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        raise damaged(path, f"it has {size} bytes, a header has at least {PREFIX.size}")
    magic, version, num_bytes, check = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise damaged(path, "it does not begin as a trace does")
    if version != VERSION:
        raise damaged(path, f"it has version {version}, this offmoe reads {VERSION}")
    if num_bytes > min(MAX_HEADER_BYTES, size - PREFIX.size):
        raise damaged(path, f"its header claims {num_bytes} bytes, {size - PREFIX.size} follow")
    raw = file.read(num_bytes)
    if zlib.crc32(raw) != check:
        raise damaged(path, "its header's checksum differs")
    try:
        return _header_of(json.loads(raw))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(path, f"its header is wrong ({' '.join(str(error).split())[:80]})") from None


def _header_of(values: dict[str, Any]) -> TraceHeader:
    def counts(name: str, least: int, most: int) -> tuple[int, ...]:
        items = values[name]
        if not isinstance(items, list) or not 1 <= len(items) <= MAX_LAYERS:
            raise ValueError(f"{name} is no list of 1 to {MAX_LAYERS}")
        if not all(type(item) is int and least <= item <= most for item in items):
            raise ValueError(f"{name} has more than counts from {least} to {most}")
        return tuple(items)

    for name in ("model", "model_hash", "created"):
        if not isinstance(values[name], str) or not values[name].isprintable():
            raise ValueError(f"{name} is no text")
    if type(values["top_k"]) is not int or not isinstance(values["prompts"], dict):
        raise ValueError("top_k or prompts")
    experts, num_bytes = counts("experts_per_layer", 1, PADDING), counts("expert_bytes", 0, 1 << 50)
    if len(experts) != len(num_bytes):
        raise ValueError(f"{len(experts)} layers have experts, {len(num_bytes)} sizes")
    return TraceHeader(
        model=values["model"], model_hash=values["model_hash"], experts_per_layer=experts, top_k=values["top_k"],
        expert_bytes=num_bytes, created=values["created"], prompts=values["prompts"],
    )  # fmt: skip


class _Reader:
    def __init__(self, file: BinaryIO, header: TraceHeader, size: int) -> None:
        self._file, self._header, self._size = file, header, size
        self._events: list[TraceEvent] = []
        self._prompt_starts: list[int] = []

    def read(self) -> Trace:
        end: dict[str, Any] | None = None
        note = None
        start = self._file.tell()
        try:
            for tag, raw in self._frames():
                if tag == EVENTS_TAG:
                    self._events += self._unpack(raw)
                elif tag == PROMPT_TAG:
                    self._prompt_starts.append(len(self._events))
                else:
                    end = _end_of(raw)
                    break
                start = self._file.tell()
            if end is None:
                note = "it was cut off while it was written"
            elif not end.get("complete"):
                note = "its recording was stopped before its end"
        except _CutOffError as error:
            note = f"{error} at byte {start} of {self._size}"
        if note is not None:
            note = f"{note}: {len(self._events)} layer calls of {len(self._prompt_starts)} prompts are used"
        return Trace(
            header=self._header, events=self._events, prompt_starts=self._prompt_starts,
            is_complete=note is None, note=note,
        )  # fmt: skip

    def _frames(self) -> Iterator[tuple[int, bytes]]:
        while prefix := self._file.read(FRAME.size):
            if len(prefix) < FRAME.size:
                raise _CutOffError("it is cut off")
            tag, num_stored, num_unpacked, check = FRAME.unpack(prefix)
            if num_stored > self._size - self._file.tell():
                raise _CutOffError("it is cut off")
            if num_unpacked > MAX_FRAME_BYTES or tag not in (EVENTS_TAG, PROMPT_TAG, END_TAG):
                raise _CutOffError("it is damaged")
            stored = self._file.read(num_stored)
            if frame_check(tag, stored, num_unpacked) != check:
                raise _CutOffError("it is damaged (a checksum differs)")
            yield tag, _unzip(stored, num_unpacked)

    def _unpack(self, raw: bytes) -> list[TraceEvent]:
        """A frame's events; all or none."""
        events, place = [], 0
        while place < len(raw):
            event, place = self._unpack_one(raw, place)
            events.append(event)
            if len(self._events) + len(events) > MAX_EVENTS:
                raise _CutOffError(f"it has more than {MAX_EVENTS} layer calls")
        return events

    def _unpack_one(self, raw: bytes, place: int) -> tuple[TraceEvent, int]:
        def take(num_bytes: int) -> bytes:
            nonlocal place
            begin, place = place, place + num_bytes
            if place > len(raw):
                raise _CutOffError("it is damaged (an event is longer than its frame)")
            return raw[begin:place]

        def take_ids(count: int) -> array[int]:
            ids = _ids(take(2 * count))
            if not is_padding_or_below(ids, num_experts):
                raise _CutOffError(f"it is damaged (an expert above {num_experts - 1})")
            return ids

        layer_idx, top_k, num_tokens, flags = EVENT.unpack(take(EVENT.size))
        if layer_idx >= self._header.num_layers or not top_k or not num_tokens:
            raise _CutOffError("it is damaged (a layer call that cannot be)")
        num_experts = self._header.experts_per_layer[layer_idx]
        ids = take_ids(num_tokens * top_k)
        weights = take(2 * len(ids)) if flags & HAS_WEIGHTS else None
        guesses: dict[int, tuple[int, ...]] = {}
        for _ in range(take(1)[0] if flags & HAS_GUESSES else 0):
            distance, count = struct.unpack("<BH", take(3))
            guesses[distance] = tuple(take_ids(count))
        return TraceEvent(layer_idx, top_k, bool(flags & IS_PREFILL), ids, weights, guesses), place


def _ids(raw: bytes) -> array[int]:
    ids = array("H")
    ids.frombytes(raw)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def _unzip(stored: bytes, num_unpacked: int) -> bytes:
    """Exactly `num_unpacked` bytes; never more are made, whatever `stored` says."""
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(stored, num_unpacked) if num_unpacked else b""
    except zlib.error:
        raise _CutOffError("it is damaged") from None
    if len(raw) != num_unpacked:
        raise _CutOffError("it is damaged")
    return raw


def _end_of(raw: bytes) -> dict[str, Any]:
    try:
        end = json.loads(raw)
    except ValueError:
        raise _CutOffError("its end is damaged") from None
    return end if isinstance(end, dict) else {}
