"""Writes a sharded safetensors checkpoint a piece at a time, so that a checkpoint larger than RAM can be made.

The safetensors library wants a whole shard in memory and copies it; here one piece of one tensor is held. The file
format is the published one (8 bytes of header length, a JSON header, the data), and within a shard the tensors lie
in name order as the library lays them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchlib.families import TensorSpec

PIECE_ELEMENTS = 1 << 24  # 64 MiB of float32 while a piece is drawn
DTYPES = {
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}


def write_checkpoint(
    out_dir: Path,
    specs: Sequence[TensorSpec],
    *,
    dtype: str,
    seed: int,
    max_shard_bytes: int,
    on_shard: Callable[[str, int], None],
) -> int:
    """Write all shards and `model.safetensors.index.json`; return the bytes of tensor data.

    `on_shard(file_name, num_bytes)` is called after each shard. A tensor's numbers depend on its name, its shape,
    `dtype` and `seed` only, so another shard size gives the same weights.
    """
    item_bytes = DTYPES[dtype][0].itemsize
    shards = split_shards(specs, item_bytes=item_bytes, max_shard_bytes=max_shard_bytes)
    weight_map: dict[str, str] = {}
    for shard_idx, shard in enumerate(shards):
        name = f"model-{shard_idx + 1:05d}-of-{len(shards):05d}.safetensors"
        shard_bytes = _write_shard(out_dir / name, shard, dtype=dtype, seed=seed)
        weight_map |= dict.fromkeys((spec.name for spec in shard), name)
        on_shard(name, shard_bytes)
    total_bytes = sum(spec.num_elements for spec in specs) * item_bytes
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total_bytes


def split_shards(specs: Sequence[TensorSpec], *, item_bytes: int, max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Fill shards in model order, each up to `max_shard_bytes` (a larger tensor has a shard of its own)."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        size = spec.num_elements * item_bytes
        if size > room or not shards:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(spec)
        room -= size
    return shards


def _write_shard(path: Path, shard: list[TensorSpec], *, dtype: str, seed: int) -> int:
    """Write one safetensors file; return the bytes of its tensor data."""
    torch_dtype, dtype_name = DTYPES[dtype]
    ordered = sorted(shard, key=lambda spec: spec.name)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in ordered:
        end = offset + spec.num_elements * torch_dtype.itemsize
        header[spec.name] = {"dtype": dtype_name, "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as the library pads it
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in ordered:
            for piece in draw_pieces(spec, seed=seed):
                file.write(piece.to(torch_dtype).view(torch.uint8).numpy().data)
    return offset


def draw_pieces(spec: TensorSpec, *, seed: int) -> Iterator[torch.Tensor]:
    """The tensor's numbers as flat float32 pieces: ones for norms, else normal with its deviation."""
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(spec.name.encode()))
    for start in range(0, spec.num_elements, PIECE_ELEMENTS):
        count = min(PIECE_ELEMENTS, spec.num_elements - start)
        if spec.ones:
            yield torch.ones(count)
        else:
            yield torch.randn(count, generator=generator).mul_(spec.deviation)
