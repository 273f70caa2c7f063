"""Checkpoint folders, whole and broken: one table of tensors, or one line that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import one_line, safetensors_bytes, write_shards
from safetensors.torch import load, save_file

from offmoe.checkpoint import index as index_module
from offmoe.checkpoint.index import INDEX_NAME, SINGLE_NAME, CheckpointIndex
from offmoe.checkpoint.json_file import read_json
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.core.errors import CheckpointError, ModelNotFoundError, OffmoeError, UnsupportedModelError

A = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
C = {"c": torch.tensor(7.0), "d": torch.zeros(0, 5)}


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def read_tensors(index: CheckpointIndex) -> dict[str, torch.Tensor]:
    """Every tensor of the index, through safetensors, from the bytes that the index points at."""
    found = {}
    for name, entry in index.tensors.items():
        raw = bytearray(entry.num_bytes)
        index.read_bytes_into(entry, memoryview(raw))
        header = {"t": {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [0, entry.num_bytes]}}
        found[name] = load(safetensors_bytes(header, bytes(raw)))["t"]
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_single_file(tmp_path: Path) -> None:
    save_file(A, tmp_path / SINGLE_NAME)
    index = CheckpointIndex.open(tmp_path)
    assert_same(read_tensors(index), A)
    assert index.num_bytes == 24 + 8
    assert repr(index) == f"<CheckpointIndex {tmp_path.name} [1 files, 2 tensors]>"
    index.close()


def test_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": A, "y.safetensors": C})
    index = CheckpointIndex.open(tmp_path)
    assert_same(read_tensors(index), A | C)
    assert {index.files[entry.file_idx].name for entry in index.tensors.values()} == {"x.safetensors", "y.safetensors"}
    index.close()


@pytest.mark.parametrize("is_stale", [False, True])
def test_a_single_file_goes_before_shards_as_in_transformers(is_stale: bool, tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": A})
    save_file(C, tmp_path / SINGLE_NAME)
    if is_stale:
        (tmp_path / "x.safetensors").unlink()
    index = CheckpointIndex.open(tmp_path)
    assert index.tensors.keys() == C.keys()
    index.close()


def test_a_single_file_that_the_index_names_is_a_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": A, SINGLE_NAME: C})
    index = CheckpointIndex.open(tmp_path)
    assert_same(read_tensors(index), A | C)
    index.close()


LIES: dict[str, dict[str, str]] = {
    "forgets a tensor": {"a": "x.safetensors", "c": "y.safetensors"},
    "exchanges two": {"a": "y.safetensors", "b": "x.safetensors", "c": "x.safetensors", "d": "y.safetensors"},
    "names one that is in no shard": {"a": "x.safetensors", "ghost": "x.safetensors", "c": "y.safetensors"},
}


@pytest.mark.parametrize("weight_map", LIES.values(), ids=LIES)
def test_headers_decide_and_not_the_index(weight_map: dict[str, str], tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": A, "y.safetensors": C})
    write_index(tmp_path, weight_map)
    index = CheckpointIndex.open(tmp_path)
    assert_same(read_tensors(index), A | C)
    index.close()


def test_the_same_tensor_in_two_shards_is_one(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": A, "y.safetensors": C | {"b": A["b"]}})
    index = CheckpointIndex.open(tmp_path)
    assert_same(read_tensors(index), A | C)
    index.close()


def missing_shards(folder: Path) -> None:
    write_shards(folder, {f"{i}.safetensors": {str(i): torch.ones(1)} for i in range(4)})
    (folder / "1.safetensors").unlink()
    (folder / "2.safetensors").unlink()


def shard_is_a_folder(folder: Path) -> None:
    write_index(folder, {"a": "x.safetensors"})
    (folder / "x.safetensors").mkdir()


def tensor_twice(folder: Path) -> None:
    write_shards(folder, {"x.safetensors": A, "y.safetensors": C | {"b": torch.ones(1)}})


def tensor_twice_with_other_values(folder: Path) -> None:
    write_shards(folder, {"x.safetensors": A, "y.safetensors": C | {"b": A["b"] + 1}})


def weight_map(value: Any) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, value)


def index_text(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / INDEX_NAME).write_text(text)

    return write


def pickles_only(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00002.bin").touch()
    (folder / "pytorch_model-00002-of-00002.bin").touch()


def loose_shards(folder: Path) -> None:
    save_file(A, folder / "model-00001-of-00002.safetensors")
    save_file(C, folder / "model-00002-of-00002.safetensors")


def damaged_second_shard(folder: Path) -> None:
    write_shards(folder, {"x.safetensors": A, "y.safetensors": C})
    (folder / "y.safetensors").write_bytes(b"\xff" * 100)


OUTSIDE = "which is no shard name"
# name -> (how the folder is made, what is raised, what the message says)
BROKEN: dict[str, tuple[Callable[[Path], None], type[OffmoeError], str]] = {
    "missing shards": (missing_shards, CheckpointError, "lacks 2 of 4 shards, first 1.safetensors"),
    "shard is a folder": (shard_is_a_folder, CheckpointError, "lacks 1 of 1 shards"),
    "tensor twice": (tensor_twice, CheckpointError, "'b' is in both x.safetensors and y.safetensors"),
    "tensor twice, alike": (
        tensor_twice_with_other_values,
        CheckpointError,
        "'b' is in both x.safetensors and y.safetensors, with other",
    ),
    "path upwards": (weight_map({"a": "../x.safetensors"}), CheckpointError, OUTSIDE),
    "absolute path": (weight_map({"a": "/etc/x.safetensors"}), CheckpointError, OUTSIDE),
    "path into a folder": (weight_map({"a": "sub/x.safetensors"}), CheckpointError, OUTSIDE),
    "path to a pickle": (weight_map({"a": "pytorch_model.bin"}), CheckpointError, OUTSIDE),
    "shard name is a number": (weight_map({"a": 1}), CheckpointError, OUTSIDE),
    "shard name is too long": (weight_map({"a": "x" * 300 + ".safetensors"}), CheckpointError, OUTSIDE),
    "shard name with a zero byte": (weight_map({"a": "x\0.safetensors"}), CheckpointError, OUTSIDE),
    "shard name of two lines": (weight_map({"a": "x\n.safetensors"}), CheckpointError, OUTSIDE),
    "shard name of half a character": (weight_map({"a": "\ud800.safetensors"}), CheckpointError, OUTSIDE),
    "tensor name of two lines": (weight_map({"a\nb": "../x"}), CheckpointError, r"'a\nb'"),
    "empty weight_map": (weight_map({}), CheckpointError, "has no weight_map"),
    "weight_map is a list": (weight_map([1]), CheckpointError, "has no weight_map"),
    "index without weight_map": (index_text("{}"), CheckpointError, "has no weight_map"),
    "index is a list": (index_text("[]"), CheckpointError, "a JSON list, not an object"),
    "index is cut": (index_text('{"weight_map": {"a": "x.safe'), CheckpointError, "cannot be read as JSON"),
    "pickles only": (pickles_only, UnsupportedModelError, "first pytorch_model-00001-of-00002.bin"),
    "shards without index": (loose_shards, CheckpointError, "2 safetensors files (first model-00001-of-00002"),
    "damaged second shard": (damaged_second_shard, CheckpointError, "y.safetensors: the header claims"),
    "nothing there": (lambda folder: None, ModelNotFoundError, f"no {SINGLE_NAME} and no {INDEX_NAME}"),
}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[ShardFile]:
    """Every shard file that the index opens."""
    files: list[ShardFile] = []

    class Remembered(ShardFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            files.append(self)

    monkeypatch.setattr(index_module, "ShardFile", Remembered)
    return files


@pytest.mark.parametrize(("make", "error", "says"), BROKEN.values(), ids=BROKEN)
def test_broken_folder(
    make: Callable[[Path], None], error: type[OffmoeError], says: str, tmp_path: Path, opened: list[ShardFile]
) -> None:
    make(tmp_path)
    with pytest.raises(error) as caught:
        CheckpointIndex.open(tmp_path)
    message = one_line(caught)
    assert says in message
    assert str(tmp_path) in message or INDEX_NAME in message or "in both" in message
    assert all(file.raw.closed for file in opened)  # type: ignore[attr-defined]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        CheckpointIndex.open(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in one_line(caught)


def test_pickles_are_never_opened(tmp_path: Path, opened: list[ShardFile]) -> None:
    pickles_only(tmp_path)
    write_shards(tmp_path, {"x.safetensors": A})
    CheckpointIndex.open(tmp_path).close()
    assert [file.name for file in opened] == ["x.safetensors"]


BAD_JSON = {
    "cut": (b'{"a": ', "cannot be read as JSON"),
    "empty": (b"", "cannot be read as JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "cannot be read as JSON"),
    "too deep": (b'{"a": ' + b"[" * 100_000, "cannot be read as JSON"),
    "deep": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "is nested more than 64 deep"),
    "a list": (b"[1]", "a JSON list, not an object"),
    "null": (b"null", "a JSON NoneType, not an object"),
}


@pytest.mark.parametrize(("raw", "says"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json(raw: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    message = one_line(caught)
    assert str(path) in message and says in message


def test_json_that_is_missing_or_a_folder_or_huge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        read_json(tmp_path / "config.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read \S*folder\.json: Is a directory"):
        read_json(tmp_path / "folder.json")
    monkeypatch.setattr("offmoe.checkpoint.json_file.MAX_JSON_BYTES", 10)
    (tmp_path / "large.json").write_text('{"a": "123"}')
    with pytest.raises(CheckpointError, match=r"large.json has 12 bytes; more than 10"):
        read_json(tmp_path / "large.json")
