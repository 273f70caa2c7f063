"""Safetensors headers as hostile input: whatever the bytes, either valid entries or a CheckpointError of one line."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from makers import one_line, safetensors_bytes

from offmoe.checkpoint.header import MAX_HEADER_BYTES, read_header
from offmoe.checkpoint.tensor_entry import ITEM_BITS, TensorEntry
from offmoe.core.errors import CheckpointError


def read(raw: bytes) -> dict[str, TensorEntry]:
    return read_header(io.BytesIO(raw), file_name="x.safetensors", file_bytes=len(raw), file_idx=3)


def tensor(dtype: Any = "F32", shape: Any = (2,), data_offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


def one_tensor(**fields: Any) -> bytes:
    return safetensors_bytes({"w": tensor(**fields)}, bytes(8))


# name -> (file, what the message says beside the file's name)
HOSTILE = {
    "empty file": (b"", "has 0 bytes"),
    "seven bytes": (bytes(7), "has 7 bytes"),
    "length beyond the file": ((1000).to_bytes(8, "little") + b"{}", "claims 1000 bytes, the file has 10"),
    "length beyond 64 bits' use": (b"\xff" * 8 + b"{}", "claims 18446744073709551615 bytes"),
    "no header at all": (bytes(8), "not valid JSON"),
    "not JSON": (safetensors_bytes(b"{nope"), "not valid JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff\xfe\xfd": 1}'), "not valid JSON"),
    "a list": (safetensors_bytes([1, 2]), "a JSON list, not an object"),
    "a number": (safetensors_bytes(7), "a JSON int, not an object"),
    "the same tensor twice": (safetensors_bytes(b'{"w": 1, "w": 1}'), "names a tensor twice"),
    "nested too deep": (safetensors_bytes(b'{"w":' + b"[" * 100_000), "not valid JSON"),
    "a number of 5000 digits": (safetensors_bytes(b'{"w": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "fields are no object": (safetensors_bytes({"w": [1]}), "'w' lacks"),
    "fields are missing": (safetensors_bytes({"w": {"dtype": "F32", "shape": [2]}}), "'w' lacks"),
    "unknown type": (one_tensor(dtype="F31"), "unknown type 'F31'"),
    "type is no text": (one_tensor(dtype=["F32"]), "unknown type"),
    "type is a name of 10000 letters": (one_tensor(dtype="F" * 10_000), "unknown type 'FFFF"),
    "shape is no list": (one_tensor(shape=2), "shape 2"),
    "shape is text": (one_tensor(shape="2"), "shape '2'"),
    "negative size": (one_tensor(shape=[-2, -1]), "shape [-2, -1]"),
    "true as a size": (one_tensor(shape=[True, 2]), "shape [True, 2]"),
    "a size with a fraction": (one_tensor(shape=[2.0]), "shape [2.0]"),
    "a size beyond 64 bits": (one_tensor(shape=[1 << 64]), "shape [18446744073709551616]"),
    "sizes whose product is no float": (one_tensor(shape=[10**300] * 2), "shape [1000"),
    "sizes whose product has 5000 digits": (one_tensor(shape=[10**4000] * 2), "shape [1000"),
    "huge sizes, zero bytes": (one_tensor(shape=[2**60, 2**60], data_offsets=[0, 0]), "its byte range has 0"),
    "too many dimensions": (one_tensor(shape=[1] * 9), "at most 8 sizes"),
    "a million dimensions": (one_tensor(shape=[1] * 1_000_000), "at most 8 sizes"),
    "offsets are no list": (one_tensor(data_offsets=8), "byte range 8"),
    "one offset": (one_tensor(data_offsets=[8]), "byte range [8]"),
    "three offsets": (one_tensor(data_offsets=[0, 4, 8]), "byte range [0, 4, 8]"),
    "negative offset": (one_tensor(data_offsets=[-8, 0]), "byte range [-8, 0]"),
    "offset with a fraction": (one_tensor(data_offsets=[0.0, 8.0]), "byte range [0.0, 8.0]"),
    "offsets backwards": (one_tensor(data_offsets=[8, 0]), "byte range [8, 0]"),
    "offset beyond 64 bits": (one_tensor(data_offsets=[0, 10**400]), "byte range [0, 1000"),
    "range too small": (one_tensor(shape=[3]), "needs 96 bits, its byte range has 64"),
    "range too large": (one_tensor(shape=[1]), "needs 32 bits, its byte range has 64"),
    "half a byte over": (one_tensor(dtype="F4", shape=[15]), "needs 60 bits, its byte range has 64"),
    "last byte missing": (safetensors_bytes({"w": tensor()}, bytes(7)), "the file has"),
    "range out of the file": (one_tensor(data_offsets=[8, 16]), "ends at byte 86, the file has 78"),
    "overlap": (
        safetensors_bytes({"a": tensor(), "b": tensor(data_offsets=[4, 12])}, bytes(12)),
        "tensors 'a' and 'b' overlap",
    ),
    "same range": (safetensors_bytes({"a": tensor(), "b": tensor()}, bytes(8)), "tensors 'a' and 'b' overlap"),
    "one inside another, far apart": (
        safetensors_bytes(
            {"a": tensor(shape=[4], data_offsets=[0, 16]), "e": tensor(shape=[0], data_offsets=[8, 8]),
             "b": tensor(data_offsets=[8, 16])}, bytes(16),
        ),
        "tensors 'a' and 'b' overlap",
    ),
    "a type nested 900 deep": (
        safetensors_bytes(b'{"w":{"dtype":' + b"[" * 900 + b"]" * 900 + b',"shape":[],"data_offsets":[]}}'),
        "unknown type [[",
    ),
    "a name of 10000 letters": (safetensors_bytes({"w" * 10_000: 1}), "ww' lacks"),
    "a name of several lines": (safetensors_bytes({"a\nb": 1}), r"'a\nb' lacks"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "says"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_header_is_refused_in_one_line(raw: bytes, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(raw)
    message = one_line(caught)
    assert message.startswith("x.safetensors")
    assert says in message
    assert len(message) < 500


def test_a_lying_length_is_not_allocated() -> None:
    """The file is said to be large enough; the limit of the format holds all the same."""
    claim = (MAX_HEADER_BYTES + 1).to_bytes(8, "little")
    with pytest.raises(CheckpointError, match=f"claims {MAX_HEADER_BYTES + 1} bytes"):
        read_header(io.BytesIO(claim), file_name="x", file_bytes=1 << 40, file_idx=0)


def test_header_that_ends_early() -> None:
    """The size is of another moment than the read: the file was cut in between."""
    raw = (100).to_bytes(8, "little") + b'{"w": '
    with pytest.raises(CheckpointError, match="ends inside its header \\(6 of 100 bytes\\)"):
        read_header(io.BytesIO(raw), file_name="x", file_bytes=1000, file_idx=0)


def test_ranges_are_absolute_and_metadata_is_no_tensor() -> None:
    header = {"__metadata__": {"format": "pt"}, "w": tensor(dtype="BF16", shape=[2, 3], data_offsets=[4, 16])}
    raw = safetensors_bytes(header, bytes(16))
    data_start = len(raw) - 16
    assert read(raw) == {
        "w": TensorEntry(name="w", dtype="BF16", shape=(2, 3), file_idx=3, start=data_start + 4, num_bytes=12)
    }


def test_zero_size_and_zero_dim_tensors_are_valid_anywhere() -> None:
    header = {
        "scalar": tensor(shape=[], data_offsets=[0, 4]),
        "none": tensor(shape=[0, 7], data_offsets=[2, 2]),
        "end": tensor(shape=[3, 0], data_offsets=[4, 4]),
    }
    entries = read(safetensors_bytes(header, bytes(4)))
    assert {name: (entry.shape, entry.num_bytes) for name, entry in entries.items()} == {
        "scalar": ((), 4), "none": ((0, 7), 0), "end": ((3, 0), 0),
    }  # fmt: skip


def test_no_tensors() -> None:
    assert read(safetensors_bytes({})) == {}


@pytest.mark.parametrize("dtype", ITEM_BITS)
def test_every_type_is_measured_in_bits(dtype: str) -> None:
    entries = read(one_tensor(dtype=dtype, shape=[64 // ITEM_BITS[dtype]] if 64 % ITEM_BITS[dtype] == 0 else [0],
                              data_offsets=[0, 8] if 64 % ITEM_BITS[dtype] == 0 else [8, 8]))  # fmt: skip
    assert entries["w"].dtype == dtype


sizes = st.integers(0, 9) | st.integers() | st.sampled_from([2**31, 2**63, 2**64, 10**400])
json_values = st.recursive(
    st.none() | st.booleans() | sizes | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
maybe_tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", "F31"]) | json_values,
        "shape": st.lists(sizes, max_size=9) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.sampled_from(["__metadata__", "a", "b", "\n", "\ud800"]), maybe_tensors | json_values)


@given(raw=st.binary(max_size=200) | st.builds(safetensors_bytes, st.binary(max_size=100), st.binary(max_size=20)))
def test_arbitrary_bytes_are_entries_or_a_checkpoint_error(raw: bytes) -> None:
    check_entries_or_error(raw)


@given(header=headers | json_values, data=st.binary(max_size=40))
def test_arbitrary_json_is_entries_or_a_checkpoint_error(header: Any, data: bytes) -> None:
    check_entries_or_error(safetensors_bytes(header, data))


def check_entries_or_error(raw: bytes) -> None:
    try:
        entries = read(raw)
    except CheckpointError as error:
        assert str(error).isprintable()
        return
    taken: set[int] = set()
    for entry in entries.values():
        own = set(range(entry.start, entry.start + entry.num_bytes))
        assert math.prod(entry.shape) * ITEM_BITS[entry.dtype] == 8 * entry.num_bytes
        assert entry.start >= 8 and entry.start + entry.num_bytes <= len(raw)
        assert not own & taken
        taken |= own


NUMPY_DTYPES = {
    "F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8, "U8": np.uint8, "I16": np.int16,
    "U16": np.uint16, "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "BOOL": np.bool_,
}  # fmt: skip
shapes = st.lists(st.integers(0, 4), max_size=4)


@given(
    made=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(NUMPY_DTYPES)), shapes),
        max_size=6,
    ),
    metadata=st.none()
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.just("v"), min_size=1, max_size=2),
)
def test_files_of_the_safetensors_library_read_back(
    made: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None
) -> None:
    arrays: dict[str, Any] = {
        name: (np.arange(math.prod(shape)) + idx).astype(NUMPY_DTYPES[dtype]).reshape(shape)
        for idx, (name, (dtype, shape)) in enumerate(made.items())
    }
    raw = safetensors.numpy.save(arrays, metadata)
    header_bytes = int.from_bytes(raw[:8], "little")
    published = json.loads(raw[8 : 8 + header_bytes])

    entries = read(raw)
    assert entries.keys() == made.keys()
    for name, (dtype, shape) in made.items():
        entry = entries[name]
        end = entry.start + entry.num_bytes
        assert (entry.name, entry.dtype, entry.shape) == (name, dtype, tuple(shape))
        assert [entry.start, end] == [8 + header_bytes + offset for offset in published[name]["data_offsets"]]
        assert raw[entry.start : end] == arrays[name].tobytes()
