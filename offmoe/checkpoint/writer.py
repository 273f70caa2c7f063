"""Writing a checkpoint shard by shard, so that a run that was cut off goes on where it was. No torch.

While a run is under way the folder holds a record of it, finished shards under a temporary name and at most one that is
being written; the index and config.json come last, so the folder never looks like a checkpoint before it is one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from offmoe.checkpoint.index import INDEX_NAME
from offmoe.checkpoint.shard_file import DIRECT_ALIGN_BYTES
from offmoe.checkpoint.tensor_entry import ITEM_BITS
from offmoe.core.errors import OutputError, UsageError
from offmoe.core.units import format_bytes

RECORD_NAME = ".offmoe-quantize.json"
_FINISHED, _WRITING, _PROGRESS = ".finished", ".writing", ".progress"
# A run that is killed loses at most as much of a shard.
COMMIT_BYTES = 128 << 20
CONFIG_NAME = "config.json"
# The index, config.json, tokenizer files and headers: small beside any model's weights.
_SLACK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A tensor to be written; `dtype` is the safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShard:
    """One file: its tensors in the order of their bytes. `align_from` is the first that should lie on a 4096 border."""

    tensors: tuple[PlannedTensor, ...]
    align_from: int = 0

    @property
    def header(self) -> bytes:
        """Length and JSON, with as many spaces as put tensor `align_from` on a border of direct reads."""
        fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end, aligned = 0, 0
        for idx, tensor in enumerate(self.tensors):
            if idx == self.align_from:
                aligned = end
            fields[tensor.name] = {
                "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.num_bytes],
            }  # fmt: skip
            end += tensor.num_bytes
        raw = json.dumps(fields, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw) + aligned) % DIRECT_ALIGN_BYTES)
        return len(raw).to_bytes(8, "little") + raw

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def refuse_target(source: Path, target: Path) -> None:
    """Raise UsageError when `target` is `source`, inside of it, or holds anything but a run that was cut off."""
    if source.resolve() == target.resolve():
        raise UsageError(f"source and target are both {source}; name another folder for the result")
    if target.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{target} is inside of {source}; name a folder elsewhere for the result")
    _refuse_foreign(target)


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder that does not exist yet")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if RECORD_NAME not in names and names - {RECORD_NAME + _WRITING}:  # that may be all that a killed run left
        raise UsageError(f"{folder} is not empty; name a folder that does not exist yet, or remove it")


class CheckpointWriter:
    """A folder that becomes a checkpoint of `shards`. Use `begin`, `write` what `is_finished` denies, then `finish`."""

    def __init__(self, folder: Path, shards: Sequence[PlannedShard], identity: Mapping[str, Any]) -> None:
        """`identity` says what is written from what: a run that was cut off is gone on with when it is the same."""
        self.folder = folder
        self._shards = shards
        self.names = [f"model-{idx + 1:05d}-of-{len(shards):05d}.safetensors" for idx in range(len(shards))]
        headers = hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()
        self._identity = {**identity, "shards": len(shards), "headers": headers}

    def begin(self) -> None:
        """Make the folder, or take up the run that was cut off in it.

        Raises UsageError for a folder that holds something else, and OutputError when there is not enough space.
        """
        _refuse_foreign(self.folder)
        with _explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._record.exists():
                self._check_record()
            self._refuse_too_little_space()
            if not self._record.exists():
                _write_whole(self._record, _json_bytes(self._identity))

    def is_finished(self, shard_idx: int) -> bool:
        """True when an earlier run, or this one, has written the whole shard."""
        shard = self._shards[shard_idx]
        paths = (self._finished(shard_idx), self.folder / self.names[shard_idx])
        num_bytes = len(shard.header) + shard.num_bytes
        return any(path.is_file() and path.stat().st_size == num_bytes for path in paths)

    def num_written(self, shard_idx: int) -> int:
        """Bytes of the shard's tensors that an earlier run has safely written before it was cut off in this shard."""
        try:
            number = int(self._progress(shard_idx).read_text())
            size = self._writing(shard_idx).stat().st_size - len(self._shards[shard_idx].header)
        except (OSError, ValueError):
            return 0
        return number if 0 < number <= min(size, self._shards[shard_idx].num_bytes) else 0

    def write(self, shard_idx: int, data: Iterable[bytes | memoryview], *, begin: int = 0) -> None:
        """Write a shard: `data` are the bytes of its tensors, in order, in pieces of any length.

        They begin at byte `begin`, which `num_written` has. Raises OutputError when the system refuses (no space).
        After that, or anything else that cuts it off, a second run goes on within this shard.
        """
        shard = self._shards[shard_idx]
        path = self._writing(shard_idx)
        written = safe = begin
        with _explained(self.folder):
            with open(path, "r+b" if begin else "wb") as file:
                if begin:
                    file.truncate(len(shard.header) + begin)
                    file.seek(0, os.SEEK_END)
                else:
                    file.write(shard.header)
                try:
                    for piece in data:
                        file.write(piece)
                        written += len(piece)
                        if written - safe >= COMMIT_BYTES:
                            safe = self._commit(shard_idx, file, written)
                except BaseException:
                    with contextlib.suppress(OSError):
                        self._commit(shard_idx, file, written)
                    raise
                file.flush()
                os.fsync(file.fileno())
            assert written == shard.num_bytes, f"{written=} {shard.num_bytes=}"
            path.replace(self._finished(shard_idx))
            self._progress(shard_idx).unlink(missing_ok=True)

    def _commit(self, shard_idx: int, file: BinaryIO, written: int) -> int:
        """Remember that so many bytes are on the drive, once they are."""
        file.flush()
        os.fsync(file.fileno())
        _write_whole(self._progress(shard_idx), str(written).encode())
        return written

    def _writing(self, shard_idx: int) -> Path:
        return self.folder / (self.names[shard_idx] + _WRITING)

    def _progress(self, shard_idx: int) -> Path:
        return self.folder / (self.names[shard_idx] + _PROGRESS)

    def finish(self, config: Mapping[str, Any], copies: Sequence[Path]) -> None:
        """Give the shards their names, copy small files, write the index and, last, config.json."""
        with _explained(self.folder):
            for idx, name in enumerate(self.names):
                if self._finished(idx).exists():
                    self._finished(idx).replace(self.folder / name)
            for leftover in self.folder.glob(f"*{_PROGRESS}*"):
                leftover.unlink()
            for source in copies:
                shutil.copyfile(source, self.folder / source.name)
            weight_map = {
                tensor.name: name
                for name, shard in zip(self.names, self._shards, strict=True)
                for tensor in shard.tensors
            }
            total = sum(shard.num_bytes for shard in self._shards)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_whole(self.folder / INDEX_NAME, _json_bytes(index))
            _write_whole(self.folder / CONFIG_NAME, _json_bytes(config))
            self._record.unlink()

    @property
    def _record(self) -> Path:
        return self.folder / RECORD_NAME

    def _finished(self, shard_idx: int) -> Path:
        return self.folder / (self.names[shard_idx] + _FINISHED)

    def _check_record(self) -> None:
        try:
            found = json.loads(self._record.read_bytes())
        except ValueError:
            found = None
        if found == self._identity:
            return
        differing = [
            key for key, value in self._identity.items() if not isinstance(found, dict) or found.get(key) != value
        ]
        raise UsageError(
            f"{self.folder} holds an unfinished run with another {differing[0] if differing else 'plan'}; repeat that "
            "run, or remove the folder"
        )

    def _refuse_too_little_space(self) -> None:
        left = [shard for idx, shard in enumerate(self._shards) if not self.is_finished(idx)]
        taken = sum(path.stat().st_size for path in self.folder.glob(f"*{_WRITING}"))
        need = sum(shard.num_bytes for shard in left) + _SLACK_BYTES
        free = shutil.disk_usage(self.folder).free + taken
        if free < need:
            raise OutputError(
                f"{format_bytes(need)} are still to be written and {self.folder} has {format_bytes(free)} free; make "
                "room, or name a folder on another drive"
            )


class _explained:  # noqa: N801 - reads as a with statement
    """Within: what the operating system refuses becomes an OutputError with its reason and what to do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = (
            "make room and run the same command again: it goes on from there"
            if full
            else "check the drive and its permissions"
        )
        raise OutputError(f"cannot write to {self._folder}: {error.strerror or error}; {advice}") from None


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write_whole(path: Path, data: bytes) -> None:
    """All of the file or none of it."""
    temporary = path.with_name(path.name + _WRITING)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
