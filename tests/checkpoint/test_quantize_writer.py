"""The shard writer: what a folder holds at every moment, and how a run goes on after one that was cut off."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from makers import one_line
from safetensors.torch import load_file

from offmoe.checkpoint.index import INDEX_NAME, CheckpointIndex
from offmoe.checkpoint.writer import CONFIG_NAME, RECORD_NAME, CheckpointWriter, PlannedShard, PlannedTensor
from offmoe.core.errors import OffmoeError, OutputError, UsageError

SHARDS = tuple(
    PlannedShard(
        tensors=(
            PlannedTensor(name=f"{idx}.shape", dtype="I64", shape=(2,)),
            PlannedTensor(name=f"{idx}.codes", dtype="I32", shape=(3, 5)),
            PlannedTensor(name=f"{idx}.scale", dtype="BF16", shape=(3, 1)),
        ),
        align_from=1,
    )
    for idx in range(3)
)


def data(idx: int) -> list[bytes]:
    return [bytes([idx + 1]) * 16, bytes([idx + 2]) * 60, bytes([idx + 3]) * 6]


def writer(folder: Path, **identity: object) -> CheckpointWriter:
    return CheckpointWriter(folder, SHARDS, {"source": "a", **identity})


def finish_all(made: CheckpointWriter) -> list[int]:
    """Write what is not there; returns which."""
    made.begin()
    missing = [idx for idx in range(3) if not made.is_finished(idx)]
    for idx in missing:
        made.write(idx, data(idx))
    made.finish({"model_type": "x"}, [])
    return missing


def test_files_are_as_planned(tmp_path: Path) -> None:
    assert finish_all(writer(tmp_path / "new" / "out")) == [0, 1, 2]
    folder = tmp_path / "new" / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        CONFIG_NAME, *(f"model-0000{idx}-of-00003.safetensors" for idx in (1, 2, 3)), INDEX_NAME,
    ]  # fmt: skip
    loaded = load_file(folder / "model-00002-of-00003.safetensors")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()} == {
        "1.shape": (torch.int64, (2,)), "1.codes": (torch.int32, (3, 5)), "1.scale": (torch.bfloat16, (3, 1)),
    }  # fmt: skip
    assert loaded["1.codes"].view(torch.uint8).unique().tolist() == [3]
    index = CheckpointIndex.open(folder)
    assert [index.tensors[f"{idx}.codes"].start % 4096 for idx in range(3)] == [0, 0, 0]
    assert index.num_bytes == json.loads((folder / INDEX_NAME).read_text())["metadata"]["total_size"] == 3 * 82
    index.close()


def test_a_run_goes_on_where_one_stopped(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield data(1)[0]
        raise KeyboardInterrupt

    first = writer(tmp_path)
    first.begin()
    first.write(0, data(0))
    with pytest.raises(KeyboardInterrupt):
        first.write(1, broken())
    assert not (tmp_path / CONFIG_NAME).exists() and not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(OffmoeError):
        CheckpointIndex.open(tmp_path)
    assert finish_all(writer(tmp_path)) == [1, 2]
    assert len(list(tmp_path.iterdir())) == 5
    CheckpointIndex.open(tmp_path).close()


def test_a_run_goes_on_after_one_that_stopped_in_its_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmoe.checkpoint.writer._write_whole", fail_for(INDEX_NAME))
    with pytest.raises(KeyboardInterrupt):
        finish_all(writer(tmp_path))
    monkeypatch.undo()
    assert not (tmp_path / CONFIG_NAME).exists() and len(list(tmp_path.glob("*.safetensors"))) == 3
    assert finish_all(writer(tmp_path)) == []
    CheckpointIndex.open(tmp_path).close()


def fail_for(name: str) -> object:
    def write(path: Path, content: bytes) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        path.write_bytes(content)

    return write


def test_a_shard_of_another_length_is_written_again(tmp_path: Path) -> None:
    made = writer(tmp_path)
    made.begin()
    made.write(0, data(0))
    finished = next(tmp_path.glob("*.finished"))
    finished.write_bytes(finished.read_bytes()[:-1])
    assert finish_all(writer(tmp_path)) == [0, 1, 2]


def test_a_run_goes_on_within_a_shard(tmp_path: Path) -> None:
    """What was safely written is not written again, whatever lies behind it."""
    whole = b"".join(data(1))

    def cut_off() -> Iterator[bytes]:
        yield whole[:70]
        raise KeyboardInterrupt

    made = writer(tmp_path)
    made.begin()
    with pytest.raises(KeyboardInterrupt):
        made.write(1, cut_off())
    with next(tmp_path.glob("*.writing")).open("ab") as file:
        file.write(b"bytes of which nothing is known")
    again = writer(tmp_path)
    again.begin()
    assert [again.num_written(idx) for idx in range(3)] == [0, 70, 0]
    again.write(1, [whole[70:]], begin=70)
    assert finish_all(writer(tmp_path)) == [0, 2]
    assert (tmp_path / "model-00002-of-00003.safetensors").read_bytes() == SHARDS[1].header + whole
    assert len(list(tmp_path.iterdir())) == 5


def test_a_shard_that_lost_bytes_begins_anew(tmp_path: Path) -> None:
    made = writer(tmp_path)
    made.begin()
    (tmp_path / "model-00001-of-00003.safetensors.progress").write_bytes(b"70")
    assert made.num_written(0) == 0, "the file is gone"
    (tmp_path / "model-00001-of-00003.safetensors.writing").write_bytes(SHARDS[0].header + bytes(69))
    assert made.num_written(0) == 0
    assert finish_all(writer(tmp_path)) == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("record", [b"", b"[1]", b"{}", b"\xff"])
def test_a_record_that_is_none(tmp_path: Path, record: bytes) -> None:
    (tmp_path / RECORD_NAME).write_bytes(record)
    with pytest.raises(UsageError, match="unfinished run with another source") as caught:
        writer(tmp_path).begin()
    one_line(caught)


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    writer(tmp_path).begin()
    with pytest.raises(UsageError, match="unfinished run with another group; repeat that run, or remove the folder"):
        writer(tmp_path, group=64).begin()
    finish_all(writer(tmp_path))
    with pytest.raises(UsageError, match="is not empty"):
        writer(tmp_path).begin()


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty; name a folder that does not exist yet"):
        writer(tmp_path).begin()
    with pytest.raises(UsageError, match="is a file"):
        writer(tmp_path / "mine.txt").begin()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_goes_on_after_one_that_only_began_its_record(tmp_path: Path) -> None:
    (tmp_path / f"{RECORD_NAME}.writing").write_bytes(b"{")
    assert finish_all(writer(tmp_path)) == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 5


def test_too_little_space_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(OutputError, match=r"64\.0 MiB are still to be written and .* has 1\.0 MiB free") as caught:
        writer(tmp_path).begin()
    one_line(caught)


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "make room and run"), (errno.EIO, "check")])
def test_a_write_that_the_system_refuses(tmp_path: Path, code: int, words: str) -> None:
    def refused() -> Iterator[bytes]:
        yield data(0)[0]
        raise OSError(code, "No space left on device" if code == errno.ENOSPC else "Input/output error")

    made = writer(tmp_path)
    made.begin()
    with pytest.raises(OutputError, match=words) as caught:
        made.write(0, refused())
    one_line(caught)
    assert finish_all(writer(tmp_path)) == [0, 1, 2]
