"""GGUF headers, read as hostile input: metadata, and every tensor's name, type, shape and byte range. No torch.

Format: magic, version, number of tensors, number of metadata pairs; the pairs; the tensors' names, sizes (innermost
first), types and offsets; then, aligned, the data. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass, field
from typing import Any, cast

from offmoe.checkpoint.gguf.file import MAGIC, why_not_gguf
from offmoe.checkpoint.quant_format import BLOCK_KINDS
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.core.errors import CheckpointError, UnsupportedModelError

VERSIONS, MAX_DEPTH = (2, 3), 3
MAX_PAIRS, MAX_TENSORS, MAX_DIMS, MAX_NAME_BYTES, MAX_TEXT_BYTES = 1 << 16, 1 << 20, 4, 1 << 10, 1 << 24
# Longer lists (vocabularies, merges) are stepped over; `gguf_vocabulary` reads them when they are needed.
MAX_KEPT_ITEMS = 4096
# Read at once while texts are stepped over: a vocabulary of 150,000 with its merges takes a twentieth of a second.
_CHUNK_BYTES = 1 << 20
# What angles are divided by: part of the config.
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
# ggml's type numbers: plain ones by safetensors' names, blocks by their kind.
_PLAIN = {0: "F32", 1: "F16", 30: "BF16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
_PLAIN_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F64": 8}
_BLOCKS = {block.type_number: kind for kind, block in BLOCK_KINDS.items()}
_OTHERS = {40: "NVFP4"}


@dataclass(frozen=True, slots=True)
class Skipped:
    """A list in the metadata that was stepped over, and the bytes of the file that hold its items. `form` is that of a
    number for `struct`, None for texts, each of which has its length (8 bytes) before it.
    """

    num_items: int
    form: str | None = None
    start: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A tensor as its file describes it; `entry.shape` is in torch's order, (rows, columns) last.

    `kind` is that of its blocks (`quant_format.BLOCK_KINDS`), and `entry` then its bytes: type U8, one row of bytes for
    each row. None for plain numbers.
    """

    kind: str | None
    shape: tuple[int, ...]
    entry: TensorEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """Contents of a file before its data. `factors`: the values of the small tensors that belong to the config."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    factors: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """llama.cpp's name, such as `qwen3moe`. Raises CheckpointError when there is none."""
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise CheckpointError(
                "the GGUF file has no general.architecture, as models have; name the model's own file"
            )
        return found


def read_gguf_header(file: ShardFile, *, file_idx: int) -> GgufHeader:
    """The validated header of one file. Raises CheckpointError naming the file for what cannot be, and
    UnsupportedModelError for a tensor of a type that is not read.
    """
    raw = io.BufferedReader(cast(io.RawIOBase, file.raw), 1 << 20)
    try:
        raw.seek(0)
        return _Reader(raw, file, file_idx).header()
    finally:
        raw.detach()


class _Reader:
    """Steps through a header; every size is compared with the file's before anything is read for it."""

    def __init__(self, raw: io.BufferedReader[io.RawIOBase], file: ShardFile, file_idx: int) -> None:
        self._raw, self._name, self._num_bytes, self._file_idx = raw, str(file.path), file.num_bytes, file_idx
        self._path = file.path

    def header(self) -> GgufHeader:
        if self._raw.peek(4)[:4] != MAGIC:
            raise CheckpointError(f"{self._name} is no GGUF file: {why_not_gguf(self._path)}")
        self._take(4)
        self._check_version(self._number("<I"))
        num_tensors, num_pairs = self._number("<Q"), self._number("<Q")
        if num_tensors > MAX_TENSORS or num_pairs > MAX_PAIRS:
            raise self._bad(f"it claims {num_tensors} tensors and {num_pairs} metadata pairs")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._text(MAX_NAME_BYTES)
            if key in metadata:
                raise self._bad(f"the metadata has {key!r} twice")
            metadata[key] = self._value(self._number("<I"))
        described = [self._describe() for _ in range(num_tensors)]
        tensors = self._tensors(described, self._data_start(metadata))
        factors = {name: self._floats(tensors[name]) for name in FACTORS if name in tensors}
        return GgufHeader(metadata=metadata, tensors=tensors, factors=factors)

    def _floats(self, tensor: GgufTensor) -> tuple[float, ...]:
        if tensor.entry.dtype != "F32" or tensor.entry.num_bytes > 4 * MAX_KEPT_ITEMS:
            raise self._bad(f"tensor {tensor.entry.name!r} is no short list of F32 numbers")
        self._raw.seek(tensor.entry.start)
        return struct.unpack(f"<{tensor.entry.num_bytes // 4}f", self._take(tensor.entry.num_bytes))

    def _check_version(self, version: int) -> None:
        if version in VERSIONS:
            return
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise UnsupportedModelError(
                f"{self._name} is a big-endian GGUF file, for processors such as IBM Z, which is not read; get the "
                "little-endian one, or convert it (gguf-convert-endian of the gguf package)"
            )
        raise UnsupportedModelError(
            f"{self._name} is of version {version} of the GGUF format, which is not read (versions {VERSIONS[0]} and "
            f"{VERSIONS[1]} are); convert the model again"
        )

    def _take(self, count: int) -> bytes:
        data = self._raw.read(count)
        if len(data) != count:
            raise self._bad("it ends inside its header")
        return data

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _left(self) -> int:
        return self._num_bytes - self._raw.tell()

    def _text(self, most: int) -> str:
        return self._text_bytes(most).decode("utf-8", errors="replace")

    def _text_bytes(self, most: int) -> bytes:
        count = self._number("<Q")
        if count > min(most, self._left()):
            raise self._bad(f"a text claims {count} bytes")
        return self._take(count)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text(MAX_TEXT_BYTES)
        if kind == _ARRAY:
            return self._list()
        form = _NUMBERS.get(kind)
        if form is None:
            raise self._bad(f"a metadata value is of type {kind}, known are 0 to 12")
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _list(self, depth: int = 1) -> list[Any] | Skipped:
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _ARRAY and depth < MAX_DEPTH and count <= MAX_KEPT_ITEMS:
            return [self._list(depth + 1) for _ in range(count)]
        form = _NUMBERS.get(kind)
        if form is None and kind != _STRING:
            raise self._bad(f"a list in the metadata is of type {kind}, or of {count} lists in {depth} others")
        item_bytes = 8 if form is None else struct.calcsize(form)
        if count * item_bytes > self._left():
            raise self._bad(f"a list in the metadata claims {count} items")
        if count <= MAX_KEPT_ITEMS:
            return [self._value(kind) for _ in range(count)]
        start = self._raw.tell()
        if form is not None:
            self._raw.seek(count * item_bytes, io.SEEK_CUR)
        else:
            self._skip_texts(count)
        return Skipped(count, form, start, self._raw.tell() - start)

    def _skip_texts(self, count: int) -> None:
        start, at, chunk = self._raw.tell(), 0, b""
        for _ in range(count):
            if at + 8 > len(chunk):
                start, at = start + at, 0
                self._raw.seek(start)
                chunk = self._raw.read(_CHUNK_BYTES)
                if len(chunk) < 8:
                    raise self._bad("it ends inside its header")
            (size,) = _LENGTH.unpack_from(chunk, at)
            at += 8 + size
            if size > MAX_TEXT_BYTES or start + at > self._num_bytes:
                raise self._bad(f"a text claims {size} bytes")
        self._raw.seek(start + at)

    def _describe(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self._text(MAX_NAME_BYTES), self._number("<I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._bad(f"tensor {name!r} has {num_dims} dimensions, at most {MAX_DIMS} are known")
        shape = tuple(self._number("<Q") for _ in range(num_dims))[::-1]
        return name, shape, self._number("<I"), self._number("<Q")

    def _data_start(self, metadata: dict[str, Any]) -> int:
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or align & (align - 1) or align > 1 << 20:
            raise self._bad(f"general.alignment is {align!r}, a power of two is needed")
        here = self._raw.tell()
        return here + -here % align

    def _tensors(self, described: list[tuple[str, tuple[int, ...], int, int]], start: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        end, last = start, ""
        for name, shape, type_number, offset in sorted(described, key=lambda tensor: tensor[3]):
            tensor = self._tensor(name, shape, type_number, start + offset)
            if name in tensors:
                raise self._bad(f"tensor {name!r} is there twice")
            if tensor.entry.start < end:
                raise self._bad(f"tensors {last!r} and {name!r} overlap")
            end, last = tensor.entry.start + tensor.entry.num_bytes, name
            if end > self._num_bytes:
                raise self._bad(f"tensor {name!r} ends at byte {end}, the file has {self._num_bytes}")
            tensors[name] = tensor
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], type_number: int, start: int) -> GgufTensor:
        if 0 in shape or math.prod(shape) > self._num_bytes * 32:
            raise self._bad(f"tensor {name!r} has shape {list(shape)}")
        plain, kind = _PLAIN.get(type_number), _BLOCKS.get(type_number)
        if plain is not None:
            num_bytes, stored, dtype = math.prod(shape) * _PLAIN_BYTES[plain], shape, plain
        elif kind is not None:
            block = BLOCK_KINDS[kind]
            if shape[-1] % block.num_columns:
                raise self._bad(f"tensor {name!r} has {shape[-1]} columns in blocks of {block.num_columns} ({kind})")
            stored = (*shape[:-1], shape[-1] // block.num_columns * block.num_bytes)
            num_bytes, dtype = math.prod(stored), "U8"
        else:
            known = ", ".join([*list(_PLAIN.values())[:3], *(kind.upper() for kind in BLOCK_KINDS)])
            raise UnsupportedModelError(
                f"{self._name}: tensor {name!r} is of GGUF type {_OTHERS.get(type_number, type_number)}, which is not "
                f"read yet; known: {known}"
            )
        entry = TensorEntry(
            name=name, dtype=dtype, shape=stored, file_idx=self._file_idx, start=start, num_bytes=num_bytes
        )
        return GgufTensor(kind=kind, shape=shape, entry=entry)

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._name} is no whole GGUF file: {what}; download it again")
