"""Small checkpoints made by hand, and what several tests need to serve experts from them. No transformers.

Shapes: D model width, F expert width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from offmoe.cache.backing_store import DiskStore
from offmoe.cache.expert_cache import ExpertCache
from offmoe.cache.policy import make_policy
from offmoe.checkpoint.expert_index import ExpertIndex, ExpertPart, MoeLayer, ReadPlan, Span, plan_read
from offmoe.checkpoint.index import INDEX_NAME, CheckpointIndex
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.core.counters import Counters
from offmoe.core.errors import DiskReadError
from offmoe.core.keys import ExpertKey
from offmoe.tiers.copier import Ticket
from offmoe.tiers.disk import DiskTier
from offmoe.tiers.host import HostPool

NUM_LAYERS, NUM_EXPERTS, TOP_K, WIDTH_D, WIDTH_F = 2, 8, 2, 48, 64
# Where an expert's bytes may lie: side by side in one file, in two files, and behind a header of odd length.
LAYOUTS = ("adjacent", "two shards", "odd header")
# The fixture `measured`: family, form, logits, expected logits.
Measured = Callable[[str, str, torch.Tensor, torch.Tensor], None]
MATRICES = ("gate_proj", "up_proj", "down_proj")


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    """The message of an error that a user will see, which must be one line of printable text."""
    text = str(caught.value)
    assert text.isprintable(), f"{text=}"
    return text


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header: bytes as they are, anything else as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    """One file a shard, and the index that names them."""
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@dataclass(frozen=True)
class TinyExperts:
    """A checkpoint of gated float32 experts: the folder, and what is in it."""

    folder: Path
    tensors: dict[str, torch.Tensor]

    def matrices(self, key: ExpertKey) -> list[torch.Tensor]:
        """Gate (F, D), up (F, D) and down (D, F) of one expert."""
        return [self.tensors[tensor_name(key, matrix)] for matrix in MATRICES]


def tensor_name(key: ExpertKey, matrix: str) -> str:
    return f"layers.{key.layer_idx}.experts.{key.expert_idx}.{matrix}"


def make_tiny_experts(
    folder: Path, *, layout: str = "adjacent", width_F: int = WIDTH_F, num_layers: int = NUM_LAYERS,
    num_experts: int = NUM_EXPERTS,
) -> TinyExperts:  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    keys = [ExpertKey(layer, expert) for layer in range(num_layers) for expert in range(num_experts)]
    tensors = {}
    for key in keys:
        for matrix in MATRICES:
            shape = (WIDTH_D, width_F) if matrix == "down_proj" else (width_F, WIDTH_D)
            tensors[tensor_name(key, matrix)] = torch.randn(shape, generator=generator) / 8
    if layout == "two shards":
        down = {name: tensor for name, tensor in tensors.items() if "down" in name}
        rest = {name: tensor for name, tensor in tensors.items() if "down" not in name}
        write_shards(folder, {"a.safetensors": rest, "b.safetensors": down})
    else:
        save_file(tensors, folder / "model.safetensors")
    if layout == "odd header":
        _pad_header(folder / "model.safetensors", lambda end: 1)
    if layout == "aligned":
        _pad_header(folder / "model.safetensors", lambda end: -end % 4096)
    return TinyExperts(folder, tensors)


def _pad_header(path: Path, num_spaces: Callable[[int], int]) -> None:
    """More spaces after the JSON, so many for its end: allowed. With one, every tensor begins at an odd byte."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(safetensors_bytes(raw[8:end] + b" " * num_spaces(end), raw[end:]))


def index_experts(index: CheckpointIndex) -> ExpertIndex:
    """What the loader finds through transformers, for a folder that `make_tiny_experts` wrote."""
    places = [name.split(".") for name in index.tensors]
    num_layers, num_experts = (1 + max(int(place[at]) for place in places) for at in (1, 3))
    layers = []
    for layer_idx in range(num_layers):
        sources = [
            [index.tensors[tensor_name(ExpertKey(layer_idx, expert), matrix)] for matrix in MATRICES]
            for expert in range(num_experts)
        ]
        parts = [
            ExpertPart(
                source_idx=idx,
                offset=0,
                shape=(entry.shape[0], entry.shape[1]),
                strides=(entry.shape[1], 1),
                dtype="F32",
            )
            for idx, entry in enumerate(sources[0])
        ]
        layers.append(
            MoeLayer(
                name=f"layers.{layer_idx}.experts", num_experts=num_experts, top_k=TOP_K, up=tuple(parts[:2]),
                down=tuple(parts[2:]), transposed=False,
                spans=tuple(
                    tuple(Span(file_idx=e.file_idx, start=e.start, num_bytes=e.num_bytes) for e in expert)
                    for expert in sources
                ),
            )
        )  # fmt: skip
    return ExpertIndex(tuple(layers))


class RecordingDisk(DiskTier):
    """A disk tier that remembers which plans were read, in order."""

    def __init__(self, files: Sequence[ShardFile], *, io: str, counters: Counters) -> None:
        super().__init__(files, io=io, counters=counters)
        self.plans_read: list[ReadPlan] = []

    def read(self, plan: ReadPlan, slot: memoryview, *, urgent: bool = True) -> Ticket:
        self.plans_read.append(plan)
        return super().read(plan, slot, urgent=urgent)


@dataclass(frozen=True)
class Opened:
    """A cache over a tiny checkpoint, with the parts that tests look into."""

    tiny: TinyExperts
    index: CheckpointIndex
    experts: ExpertIndex
    disk: RecordingDisk
    pool: HostPool
    source: DiskStore
    cache: ExpertCache

    def assert_at_rest(self) -> None:
        """No hold and no read under way, and the slot table agrees with itself."""
        self.cache.slots.check_integrity()
        assert ", 0 filling," in repr(self.cache) and "| 0 held |" in repr(self.cache), repr(self.cache)

    def cached(self) -> set[ExpertKey]:
        return {key for key in self.experts.keys() if self.cache.is_ready(key)}  # noqa: SIM118 - a method, not a dict


@contextmanager
def open_cache(
    tiny: TinyExperts,
    *,
    num_slots: int,
    io: str = "auto",
    policy: str = "lru",
    disk_type: type[RecordingDisk] = RecordingDisk,
) -> Iterator[Opened]:
    """A cache of `num_slots` slots over `tiny`, closed afterwards."""
    index = CheckpointIndex.open(tiny.folder)
    experts, counters = index_experts(index), Counters()
    disk = disk_type(index.files, io=io, counters=counters)
    pool = HostPool(num_slots=num_slots, slot_bytes=experts.slot_bytes(direct=disk.direct))
    source = DiskStore(experts, pool, disk)
    cache = ExpertCache(num_slots, len(experts.layers), source, make_policy(policy), counters)
    try:
        yield Opened(tiny, index, experts, disk, pool, source, cache)
    finally:
        disk.close()
        cache.close()
        pool.close()
        index.close()


@contextmanager
def failing_reads(opened: Opened, *keys: ExpertKey) -> Iterator[None]:
    """The drive fails for some experts: reading their bytes raises DiskReadError."""
    plans = [plan_read(opened.experts.spans(key), align_bytes=opened.disk.align_bytes) for key in keys]
    bad = {(opened.index.files[run.file_idx].name, run.start) for plan in plans for run in plan.runs}
    read_into = ShardFile.read_into

    def fail(file: ShardFile, view: memoryview, start: int, **options: Any) -> None:
        if (file.name, start) in bad:
            raise DiskReadError(f"reading {file.path} at byte {start} failed: Input/output error; check the drive")
        read_into(file, view, start, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardFile, "read_into", fail)
        yield
