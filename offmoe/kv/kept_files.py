"""Prompts that were read, kept on disk: a safetensors file for each block of tokens, named by the block's hash.

Nothing in a file is believed. Its name must be that of its block, which says model, settings, namespace and tokens. Its
tensors must have the shapes and types of this model's cache, its length must be theirs, and a hash of their bytes must
be the one in its header. Another file is refused with a warning, and removed. Files are written by a thread of their
own under another name, and put into place when they are whole. The least recently used ones go, so that all of them
stay within `size_bytes`. Other programs' files in the folder are left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from offmoe.core.errors import OutputError
from offmoe.kv.flat_states import FlatError, flatten, unflatten
from offmoe.kv.kept_blocks import KeptBlock, KeptBlocks, Name

_log = logging.getLogger("offmoe")
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_MARK = "offmoe_kept_prompt"
_MOST_HEADER_BYTES = 8 << 20
_MOST_WAITING = 256
_TYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class KeptFileError(Exception):
    """A file that is not what its name says; the message says why."""


class KeptFiles:
    """Files of blocks in `folder`, of at most `size_bytes`. Read by the thread that runs the model, written by another.

    The index is made once, of names, sizes and times; two processes may share a folder, since what one removes the
    other finds missing.
    """

    def __init__(self, folder: Path, *, size_bytes: int, fits: Callable[[KeptBlock], bool]) -> None:
        """Makes the folder, which only the user may read. `fits` says whether a block is one of this model's cache.

        Raises OutputError.
        """
        self.folder, self.size_bytes, self._fits = folder, size_bytes, fits
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = [(entry.stat(follow_symlinks=False), entry) for entry in os.scandir(folder)]
        except OSError as error:
            raise OutputError(f"prompt_cache {folder} cannot be used: {error.strerror or error}") from None
        files = sorted(
            (status.st_mtime_ns, bytes.fromhex(entry.name[:64]), status.st_size)
            for status, entry in found
            if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
        )
        self._sizes: OrderedDict[Name, int] = OrderedDict((name, size) for _, name, size in files)
        self._lock = threading.Lock()
        self._waiting: queue.Queue[tuple[Name, KeptBlock] | None] = queue.Queue(_MOST_WAITING)
        self._pending: set[Name] = set()
        self.num_refused = self.num_written = 0
        self._writer = threading.Thread(target=self._write_all, name="offmoe-kept-prompts", daemon=True)
        self._writer.start()

    def longest(self, names: Sequence[Name], *, with_states: bool) -> int:
        """The number of the first blocks of `names` that have files. Of states only the file itself tells."""
        with self._lock:
            there = next((idx for idx, name in enumerate(names) if name not in self._sizes), len(names))
        if with_states:
            while there and not self._has_states(names[there - 1]):
                there -= 1
        return there

    def write(self, names: Sequence[Name], blocks: KeptBlocks) -> None:
        """Write what has no file yet, some time later; what is too much for the writer at once is left out."""
        for name in names:
            with self._lock:
                is_new = name in blocks and name not in self._sizes and name not in self._pending
                if is_new:
                    self._pending.add(name)
            if not is_new:
                continue
            try:
                self._waiting.put_nowait((name, blocks[name]))
            except queue.Full:
                with self._lock:
                    self._pending.discard(name)
                return

    def read(self, names: Sequence[Name], root: Name, blocks: KeptBlocks) -> None:
        """Put the files of `names` that are not among `blocks` there, as far as they are good and there is room."""
        before, read = root, 0
        for name in names:
            if name not in blocks:
                try:
                    block = self._read_block(name, before)
                except KeptFileError as error:
                    self._refuse(name, str(error))
                    return
                if block is None or not blocks.room_for(block.num_bytes) or (read and before not in blocks):
                    return
                blocks.put(name, block)
                read += 1
            self._touch(name)
            before = name

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._waiting.put(None)
        self._writer.join()

    def as_dict(self) -> dict[str, int]:
        """Numbers for `Engine.stats`."""
        with self._lock:
            return {
                "disk_blocks": len(self._sizes), "disk_bytes": sum(self._sizes.values()),
                "disk_budget_bytes": self.size_bytes, "disk_refused": self.num_refused,
            }  # fmt: skip

    def _path(self, name: Name) -> Path:
        return self.folder / f"{name.hex()}.safetensors"

    def _touch(self, name: Name) -> None:
        with self._lock, contextlib.suppress(OSError):
            if name in self._sizes:
                self._sizes.move_to_end(name)
                os.utime(self._path(name))

    def _refuse(self, name: Name, why: str) -> None:
        self.num_refused += 1
        _log.warning("%s is no kept prompt of this model: %s; it is removed", self._path(name), why)
        self._forget(name)

    def _forget(self, name: Name) -> None:
        with self._lock:
            self._sizes.pop(name, None)
        with contextlib.suppress(OSError):
            self._path(name).unlink()

    def _has_states(self, name: Name) -> bool:
        try:
            with self._open(name) as file:
                return bool(_header(file, os.fstat(file.fileno()).st_size, name)[1].get("states"))
        except (KeptFileError, OSError):
            return False

    @contextlib.contextmanager
    def _open(self, name: Name) -> Iterator[Any]:
        descriptor = os.open(self._path(name), os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with open(descriptor, "rb") as file:
            yield file

    def _read_block(self, name: Name, parent: Name) -> KeptBlock | None:
        """The block in a file; None where the file is gone. Raises KeptFileError."""
        try:
            with self._open(name) as file:
                size = os.fstat(file.fileno()).st_size
                tensors, about, begin = _header(file, size, name)
                data = bytearray(size - begin)
                file.seek(begin)
                if file.readinto(data) != len(data):
                    raise KeptFileError("it ends too early")
        except OSError:
            self._forget(name)
            return None
        if about.get("parent") != parent.hex():
            raise KeptFileError("it follows another block")
        if hashlib.blake2b(data, digest_size=32).hexdigest() != about.get("contents"):
            raise KeptFileError("its contents are not those that were written")
        values = {key: _tensor(data, *entry) for key, entry in tensors.items()}
        try:
            rows = unflatten(json.loads(about["rows"]), values)
            states = unflatten(json.loads(about["states"]), values) if about.get("states") else None
        except (FlatError, ValueError, KeyError, TypeError, RecursionError):
            raise KeptFileError("its layers are not those of a cache") from None
        block = KeptBlock(parent, rows, states)
        if not self._fits(block):
            raise KeptFileError("its shapes or types are not those of the model's cache")
        return block

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            name, block = item
            try:
                self._write_block(name, block)
            except (OSError, FlatError) as error:
                _log.warning("a kept prompt was not written to %s: %s", self.folder, error)
            finally:
                with self._lock:
                    self._pending.discard(name)

    def _write_block(self, name: Name, block: KeptBlock) -> None:
        parts = _file_parts(name, block)
        size = sum(len(part) for part in parts)
        self._make_room(size)
        if size > self.size_bytes:
            return
        path = self._path(name)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600)
            with open(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        with self._lock:
            self._sizes[name] = size
            self.num_written += 1

    def _make_room(self, size: int) -> None:
        while True:
            with self._lock:
                if not self._sizes or sum(self._sizes.values()) + size <= self.size_bytes:
                    return
                oldest = next(iter(self._sizes))
            self._forget(oldest)


def _file_parts(name: Name, block: KeptBlock) -> list[bytes | memoryview]:
    """The bytes of a file: length of the header, header, tensors."""
    tensors: dict[str, torch.Tensor] = {}
    rows = flatten(block.rows, tensors, "r")
    states = "" if block.states is None else json.dumps(flatten(block.states, tensors, "s"))
    data = [memoryview(_bytes_of(tensor)) for tensor in tensors.values()]
    contents = hashlib.blake2b(digest_size=32)
    for part in data:
        contents.update(part)
    header: dict[str, Any] = {
        "__metadata__": {
            "format": _MARK, "name": name.hex(), "parent": block.parent.hex(), "contents": contents.hexdigest(),
            "rows": json.dumps(rows), "states": states,
        }
    }  # fmt: skip
    begin = 0
    for key, tensor in tensors.items():
        end = begin + tensor.nbytes
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *data]


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _header(file: Any, size: int, name: Name) -> tuple[dict[str, tuple[str, list[int], int, int]], dict[str, str], int]:
    """Tensors, metadata and the place where data begins. Raises KeptFileError."""
    first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 0 < length <= min(_MOST_HEADER_BYTES, size - 8):
        raise KeptFileError("its header has an impossible length")
    try:
        header = json.loads(file.read(length))
        about = header.pop("__metadata__")
        is_text = all(isinstance(value, str) for value in about.values())
        if about["format"] != _MARK or about["name"] != name.hex() or not is_text:
            raise KeptFileError("it has another name or form")
        place = 0
        tensors = {}
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = [int(dim) for dim in entry["shape"]]
            num = 1
            for dim in shape:
                num *= dim
            if entry["dtype"] not in _TYPES or begin != place or min(shape, default=0) < 0 or len(shape) > 8:
                raise KeptFileError("a tensor has an impossible place, type or shape")
            if end - begin != num * _TYPES[entry["dtype"]].itemsize:
                raise KeptFileError("a tensor has another size than its shape")
            tensors[key], place = (entry["dtype"], shape, begin, end), end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise KeptFileError("its header cannot be read") from None
    if 8 + length + place != size:
        raise KeptFileError("its length is not that of its tensors")
    return tensors, about, 8 + length


def _tensor(data: bytearray, dtype: str, shape: list[int], begin: int, end: int) -> torch.Tensor:
    if begin == end:
        return torch.empty(shape, dtype=_TYPES[dtype])
    numbers = torch.frombuffer(data, dtype=torch.uint8, count=end - begin, offset=begin).clone()
    return numbers.view(_TYPES[dtype]).view(shape)
