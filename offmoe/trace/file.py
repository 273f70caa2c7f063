"""The file that a trace is kept in: a header, then frames of events, then an end. Little-endian.

    magic "OFFMOETR", u32 version, u32 bytes of the header, u32 crc32 of the header, the header as JSON
    frame: u32 tag, u32 bytes stored, u32 bytes unpacked, u32 crc32 of the three before and of what is stored; zlib
    event: u16 layer, u16 top_k, u32 tokens, u8 flags, ids u16 each, weights f16 each if flagged, guesses

A frame is whole or is not used, so whatever cuts a file off (no space, a lost machine, a copy that ended early) costs
the last frame at most. A trace is written beside its place, and put there at its end, which says whether all was done.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from offmoe.core.errors import OutputError, TraceError
from offmoe.core.files import PARTIAL_SUFFIX, PendingFile, begins_with, check_output
from offmoe.trace.recorder import PADDING, TraceEvent

MAGIC, VERSION = b"OFFMOETR", 1
PREFIX, FRAME, EVENT = struct.Struct("<8sIII"), struct.Struct("<IIII"), struct.Struct("<HHIB")
EVENTS_TAG, PROMPT_TAG, END_TAG = 1, 2, 3
IS_PREFILL, HAS_WEIGHTS, HAS_GUESSES = 1, 2, 4
# A frame is written when it has this much; none may claim to unpack to more than the second.
FRAME_BYTES, MAX_FRAME_BYTES = 1 << 18, 64 << 20
MAX_HEADER_BYTES = 16 << 20
# About 300 bytes of memory each: 100,000 tokens of 50 layers.
MAX_EVENTS = 5_000_000


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """Whose choices these are. One number a layer in `experts_per_layer` and `expert_bytes` (of one expert).

    `created` is UTC in ISO form; `prompts` says what the model was given and with which settings.
    """

    model: str
    model_hash: str
    experts_per_layer: tuple[int, ...]
    top_k: int
    expert_bytes: tuple[int, ...]
    created: str
    prompts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Layers with experts."""
        return len(self.experts_per_layer)

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return sum(self.experts_per_layer)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Contents of a trace file. `prompt_starts`: at which event each prompt begins.

    `is_complete`: its writer did all that it was asked to. `note`, if not, says what is missing, in one line.
    """

    header: TraceHeader
    events: list[TraceEvent]
    prompt_starts: list[int]
    is_complete: bool
    note: str | None = None

    @property
    def num_decoded(self) -> int:
        """Tokens decoded one at a time: calls of the first layer in that phase."""
        first = self.events[0].layer_idx if self.events else 0
        return sum(not event.is_prefill and event.layer_idx == first for event in self.events)


class TraceWriter:
    """Writes `path` by way of a file beside it. Use as a context manager.

    Left in the normal way, by Ctrl-C or by SIGTERM, the file is ended and put in its place. After any other error it
    stays under its name with ".partial", which is read as a trace that was cut off. Raises OutputError where it cannot
    be written.
    """

    def __init__(self, path: Path, header: TraceHeader, *, overwrite: bool = False) -> None:
        """`overwrite`: also a file that is no trace. Raises UsageError for such a file."""
        self.path, self.num_events, self.num_prompts = path, 0, 0
        check_trace_output(path, overwrite=overwrite)
        self._buffer = bytearray()
        raw = json.dumps(asdict(header)).encode()
        if len(raw) > MAX_HEADER_BYTES:
            raise OutputError(f"a trace's header may have {MAX_HEADER_BYTES} bytes, this one has {len(raw)}")
        with self._explained():
            self._pending = PendingFile(path, partial_name=Path(os.path.realpath(path)).name + PARTIAL_SUFFIX)
            self.is_special = self._pending.is_special
            self._file = self._pending.file
            self._file.write(PREFIX.pack(MAGIC, VERSION, len(raw), zlib.crc32(raw)) + raw)

    def write(self, event: TraceEvent) -> None:
        """One layer call."""
        self._buffer += pack_event(event)
        self.num_events += 1
        if len(self._buffer) >= FRAME_BYTES:
            self._flush()

    def begin_prompt(self, num_tokens: int) -> None:
        """Begin another prompt, of so many tokens."""
        self._flush()
        self._frame(PROMPT_TAG, struct.pack("<I", num_tokens))
        self.num_prompts += 1

    def _flush(self) -> None:
        if self._buffer:
            self._frame(EVENTS_TAG, bytes(self._buffer))
            self._buffer.clear()

    def _frame(self, tag: int, raw: bytes) -> None:
        stored = zlib.compress(raw, 3)
        check = frame_check(tag, stored, len(raw))
        with self._explained():
            self._file.write(FRAME.pack(tag, len(stored), len(raw), check) + stored)

    def close(self, *, is_complete: bool) -> None:
        """End the file and put it in its place."""
        self._flush()
        end = {"events": self.num_events, "prompts": self.num_prompts, "complete": is_complete}
        self._frame(END_TAG, json.dumps(end).encode())
        with self._explained():
            self._pending.commit()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"the trace {self.path} cannot be written: {error.strerror or error}") from None

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, (KeyboardInterrupt, SystemExit)):
            self.close(is_complete=kind is None)
            return
        with contextlib.suppress(OSError, OutputError):
            self._flush()
        with contextlib.suppress(OSError):
            self._file.close()


def check_trace_output(path: Path, *, overwrite: bool = False) -> None:
    """Raise UsageError where a trace to `path` would replace a file that is none; so for the file beside it."""
    beside = Path(os.path.realpath(path))
    for each in (path, beside.with_name(beside.name + PARTIAL_SUFFIX)):
        check_output(each, "a trace", lambda found: begins_with(found, MAGIC), overwrite=overwrite)


def pack_event(event: TraceEvent) -> bytes:
    """An event as in the file."""
    flags = (
        IS_PREFILL * event.is_prefill
        | HAS_WEIGHTS * (event.weights_f16 is not None)
        | HAS_GUESSES * bool(event.guesses)
    )
    parts = [EVENT.pack(event.layer_idx, event.top_k, event.num_tokens, flags), _pack_ids(event.ids)]
    if event.weights_f16 is not None:
        parts.append(event.weights_f16)
    if event.guesses:
        parts.append(bytes([len(event.guesses)]))
        for distance, ids in sorted(event.guesses.items()):
            parts += [struct.pack("<BH", distance, len(ids)), _pack_ids(ids)]
    return b"".join(parts)


def _pack_ids(ids: Sequence[int]) -> bytes:
    packed = array("H", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def frame_check(tag: int, stored: bytes, num_unpacked: int) -> int:
    """Checksum of a frame."""
    return zlib.crc32(stored, zlib.crc32(struct.pack("<III", tag, len(stored), num_unpacked)))


def damaged(path: Path, what: str) -> TraceError:
    """The error for a file of which nothing can be used."""
    return TraceError(f"{path} is no trace that can be read: {what}; record it again with offmoe trace")


def is_padding_or_below(ids: array[int], num_experts: int) -> bool:
    """Every id names one of `num_experts` experts, or none."""
    return max(ids, default=0) < num_experts or all(idx < num_experts or idx == PADDING for idx in ids)
