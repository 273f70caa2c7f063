"""Copies from checkpoint to checkpoint: tensors in pieces, and the small files beside them. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.checkpoint.writer import CONFIG_NAME

# Read at once of a tensor that is copied, or of a matrix that is encoded.
PIECE_BYTES = 16 << 20
# Files beside the weights that the result needs as well: tokenizer, chat template, generation config, the model's code.
_COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
_COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
_MAX_COPIED_BYTES = 256 << 20


def small_files(source: Path) -> list[Path]:
    """Tokenizer, templates and the like; never weights, nor what is written anew."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.name != CONFIG_NAME
        and not path.name.endswith(".index.json")
        and (path.suffix in _COPIED or path.name.startswith(_COPIED_NAMES))
        and path.stat().st_size <= _MAX_COPIED_BYTES
    ]


def copied(entry: TensorEntry, index: CheckpointIndex) -> Iterator[memoryview]:
    """A tensor's bytes, in pieces."""
    for begin in range(0, entry.num_bytes, PIECE_BYTES):
        size = min(PIECE_BYTES, entry.num_bytes - begin)
        piece = memoryview(bytearray(size))
        index.files[entry.file_idx].read_into(piece, entry.start + begin, need_bytes=size)
        yield piece


def source_identity(index: CheckpointIndex) -> dict[str, list[int]]:
    """Sizes and times of the files: what two runs must have in common for one to go on where the other stopped."""
    status = {file.name: file.path.stat() for file in index.files}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in status.items()}
