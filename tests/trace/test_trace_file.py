"""Traces: what is written comes back, what is cut off or damaged gives what is whole, what lies is refused."""

from __future__ import annotations

import json
import struct
import zlib
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from makers import one_line

from offmoe.core.errors import OutputError, TraceError
from offmoe.trace.file import FRAME, MAGIC, PREFIX, TraceHeader, TraceWriter, frame_check, pack_event
from offmoe.trace.reader import read_trace
from offmoe.trace.recorder import PADDING, Recorder, TraceEvent, flat_ids

HEADER = TraceHeader(
    model="tiny", model_hash="ab" * 32, experts_per_layer=(8, 300), top_k=2, expert_bytes=(100, 200),
    created="2026-01-01T00:00:00+00:00", prompts={"count": 1},
)  # fmt: skip


def event(layer_idx: int = 0, ids: tuple[int, ...] = (1, 2), **values: Any) -> TraceEvent:
    return TraceEvent(layer_idx, 2, values.pop("is_prefill", len(ids) > 2), array("H", ids), **values)


def write(path: Path, events: list[TraceEvent], header: TraceHeader = HEADER) -> Path:
    with TraceWriter(path, header) as writer:
        for one in events:
            writer.write(one)
    return path


def frames(*parts: tuple[int, bytes]) -> bytes:
    """Frames with right checksums, whatever is in them."""
    found = b""
    for tag, raw in parts:
        stored = zlib.compress(raw)
        found += FRAME.pack(tag, len(stored), len(raw), frame_check(tag, stored, len(raw))) + stored
    return found


def header_bytes(values: Any) -> bytes:
    raw = values if isinstance(values, bytes) else json.dumps(values).encode()
    return PREFIX.pack(MAGIC, 1, len(raw), zlib.crc32(raw)) + raw


GOOD_HEADER = {
    "model": "m", "model_hash": "h", "experts_per_layer": [8], "top_k": 2, "expert_bytes": [100], "created": "c",
    "prompts": {},
}  # fmt: skip


@st.composite
def _events(draw: st.DrawFn) -> TraceEvent:
    layer_idx = draw(st.integers(0, 1))
    expert = st.integers(0, HEADER.experts_per_layer[layer_idx] - 1) | st.just(PADDING)
    ids = array("H", draw(st.lists(st.tuples(expert, expert), min_size=1, max_size=5).map(lambda rows: sum(rows, ()))))
    weights = draw(st.none() | st.binary(min_size=2 * len(ids), max_size=2 * len(ids)))
    named = st.lists(st.integers(0, 7), max_size=4).map(tuple)
    guesses = draw(st.dictionaries(st.integers(1, 3), named, max_size=3))
    return TraceEvent(layer_idx, 2, draw(st.booleans()), ids, weights, guesses)


@given(st.lists(_events(), min_size=1, max_size=20))
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, events: list[TraceEvent]) -> None:
    trace = read_trace(write(tmp_path_factory.mktemp("t") / "a.trace", events), model_hash=HEADER.model_hash)
    assert trace.header == HEADER
    assert trace.events == events
    assert trace.is_complete and trace.note is None


def test_an_event_says_what_it_was() -> None:
    one = event(ids=(5, 1, 1, PADDING), weights_f16=struct.pack("<4e", 0.5, 0.25, 1, 0))
    assert one.num_tokens == 2
    assert list(one.rows_by_expert().items()) == [(1, 2), (5, 1)]
    assert one.weights == (0.5, 0.25, 1.0, 0.0)
    assert list(flat_ids([3, -1, 8, 7], 8)) == [3, PADDING, PADDING, 7]


def test_the_recorder_keeps_the_last_choices_and_hands_on_all(tmp_path: Path) -> None:
    recorder = Recorder(ring_choices=6)
    for idx in range(5):
        recorder.record(0, 2, [idx, idx + 1], torch.tensor([[0.5, 1e9]]))
    assert [list(one.ids) for one in recorder.recent()] == [[2, 3], [3, 4], [4, 5]]
    recorder.guess(1, 1, [9])  # nobody records: forgotten
    with TraceWriter(tmp_path / "a", HEADER) as recorder.sink:
        recorder.begin_prompt(1)
        recorder.record(0, 2, [1, 2], None)
        recorder.reading_prompt = False
        recorder.guess(1, 1, [4, 6])
        recorder.record(0, 2, [1, 2], torch.tensor([[0.5, 1e9]]))
        recorder.record(1, 2, [4, 5], None)
        recorder.record(1, 2, [4, 5], None)
    trace = read_trace(tmp_path / "a")
    assert [one.is_prefill for one in trace.events] == [True, False, False, False]
    assert trace.events[1].weights == (0.5, 65504.0)
    assert [one.guesses for one in trace.events[1:]] == [{}, {1: (4, 6)}, {}]
    assert trace.prompt_starts == [0] and trace.num_decoded == 1


def test_a_trace_cut_off_anywhere_gives_what_is_whole(tmp_path: Path) -> None:
    """Three frames: prompts make frames."""
    path = tmp_path / "a"
    with TraceWriter(path, HEADER) as writer:
        for _ in range(3):
            writer.begin_prompt(7)
            writer.write(event())
            writer.write(event(1))
    whole = path.read_bytes()
    seen = set()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            trace = read_trace(path)
        except TraceError as error:
            assert str(path) in str(error)
            seen.add(0)
            continue
        assert not trace.is_complete
        assert trace.note is not None and "cut off" in trace.note
        assert f"{len(trace.events)} layer calls of {len(trace.prompt_starts)} prompts are used" in trace.note
        assert trace.events == [event(), event(1)] * (len(trace.events) // 2)
        seen.add(len(trace.events))
    assert seen == {0, 2, 4, 6}


def test_a_changed_byte_anywhere_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [event(), event(1)])
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            trace = read_trace(path)
        except TraceError:
            continue
        assert trace.note is not None and trace.events == [event(), event(1)], place


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it has 0 bytes"),
        (b"GGUF" * 10, "does not begin as a trace does"),
        (PREFIX.pack(MAGIC, 9, 0, 0), "version 9, this offmoe reads 1"),
        (PREFIX.pack(MAGIC, 1, 1 << 31, 0), "its header claims 2147483648 bytes, 0 follow"),
        (PREFIX.pack(MAGIC, 1, 2, 0) + b"{}", "its header's checksum differs"),
        (header_bytes(b"{"), "its header is wrong"),
        (header_bytes([]), "its header is wrong"),
        (header_bytes({**GOOD_HEADER, "experts_per_layer": [0]}), "counts from 1 to 65535"),
        (header_bytes({**GOOD_HEADER, "experts_per_layer": [1 << 70]}), "counts from 1 to 65535"),
        (header_bytes({**GOOD_HEADER, "experts_per_layer": [8, 8]}), "2 layers have experts, 1 sizes"),
        (header_bytes({**GOOD_HEADER, "model": "a\nb"}), "model is no text"),
        (header_bytes(GOOD_HEADER), "is an empty trace"),
        (header_bytes(GOOD_HEADER) + frames((3, b'{"complete": true}')), "is an empty trace"),
    ],
)
def test_a_file_without_events_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert words in one_line(caught) and str(path) in one_line(caught)


EVENT_RAW = pack_event(event())
BOMB = zlib.compress(bytes(1 << 20))


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        (frames((1, EVENT_RAW[:-1])), "longer than its frame"),
        (frames((1, struct.pack("<HHIB", 0, 2, 1 << 31, 0))), "longer than its frame"),
        (frames((1, struct.pack("<HHIB", 7, 2, 1, 0) + bytes(4))), "a layer call that cannot be"),
        (frames((1, struct.pack("<HHIB", 0, 0, 1, 0) + bytes(4))), "a layer call that cannot be"),
        (frames((1, struct.pack("<HHIBHH", 0, 2, 1, 0, 3, 8))), "an expert above 7"),
        (frames((9, b"")), "damaged"),
        (frames((3, b"{")), "its end is damaged"),
        (FRAME.pack(1, len(BOMB), 10, frame_check(1, BOMB, 10)) + BOMB, None),
        (FRAME.pack(1, 4, 1 << 31, 0) + bytes(4), "damaged"),
    ],
)
def test_a_lying_frame_ends_the_trace(tmp_path: Path, tail: bytes, words: str | None) -> None:
    path = tmp_path / "a"
    path.write_bytes(header_bytes(GOOD_HEADER) + frames((1, EVENT_RAW)) + tail)
    trace = read_trace(path)
    assert trace.events[0] == event() and len(trace.events) == 1
    assert trace.note is not None and (words or "damaged") in trace.note


def test_a_trace_of_another_model_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [event()])
    with pytest.raises(TraceError, match=r"another model \(tiny, abababababab; this one is cdcdcdcdcdcd\)"):
        read_trace(path, model_hash="cd" * 32)


def test_ctrl_c_keeps_what_is_whole_and_an_error_leaves_no_trace_in_place(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt), TraceWriter(path, HEADER) as writer:
        writer.write(event())
        raise KeyboardInterrupt
    trace = read_trace(path)
    assert trace.events == [event()] and not trace.is_complete
    assert trace.note is not None and trace.note.startswith("its recording was stopped before its end")
    path.unlink()
    with pytest.raises(RuntimeError), TraceWriter(path, HEADER) as writer:
        writer.write(event())
        raise RuntimeError
    assert not path.exists()
    partial = tmp_path / "a.partial"
    assert read_trace(partial).events == [event()]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no/such cannot be written: No such file"):
        TraceWriter(tmp_path / "no" / "such", HEADER)
    with pytest.raises(TraceError, match=r"cannot be read: No such file"):
        read_trace(tmp_path / "no")
