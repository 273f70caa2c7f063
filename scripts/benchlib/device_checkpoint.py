"""A random-weight checkpoint of a published shape, written in seconds: for benches that make their models on the spot.

Names, shapes and sizes are true. Experts are stacked (one 3-D tensor a layer and matrix), as transformers saves them.
Their numbers are cut from one pool of random bytes at ever other offsets, since drawing 15 GB would take minutes:
no two experts are equal, and no speed depends on what a weight is. All other weights are drawn one by one,
with the deviations of `families.tensor_specs`, which give routing that wanders as text does.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchlib.families import EMBEDDING_DEVIATION, OUTPUT_NAME, Config, build_config
from benchlib.shards import DTYPES

POOL_ELEMENTS = 32 << 20
PIECE_ELEMENTS = 1 << 20  # a pool's cut is written at a time; every next one begins elsewhere
STEP_ELEMENTS = 7_368_787  # a prime, so that offsets into the pool repeat late
NUM_WRITERS = 8
PAGE_BYTES = 4096
DEVIATION = 0.02  # every family's initializer_range


@dataclass(frozen=True, kw_only=True)
class MadeModel:
    """A checkpoint that was written: where, and what a token reads of it."""

    folder: Path
    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: int
    resident_bytes: int
    embedding_bytes: int

    @property
    def routed_experts(self) -> int:
        """Experts of all layers."""
        return self.num_layers * self.num_experts

    @property
    def all_experts_bytes(self) -> int:
        """Bytes of all routed experts."""
        return self.routed_experts * self.expert_bytes


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """One tensor: its file position in elements, and whether it is an experts' stack."""

    name: str
    shape: tuple[int, ...]
    experts: bool

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def make_model(
    folder: Path, like: str, *, num_layers: int, vocab_size: int, dtype: str = "bfloat16",
    overrides: Config | None = None, seed: int = 0, reuse: bool = False,
) -> MadeModel:  # fmt: skip
    """Write config.json and one safetensors file into `folder`, which is made. A second call gives the same bytes.

    `overrides` replaces sizes of the published configuration. `reuse`: a file that an earlier call completed stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = build_config(like, num_layers=num_layers, vocab_size=vocab_size, dtype=dtype, overrides=overrides)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = list(_tensors(folder))
    complete = folder / "complete"
    if not (reuse and complete.exists()):
        _write(folder / "model.safetensors", tensors, dtype=dtype, seed=seed, num_layers=num_layers)
        complete.touch()
    item_bytes = DTYPES[dtype][0].itemsize
    stacks = [tensor for tensor in tensors if tensor.experts]
    num_experts = stacks[0].shape[0]
    return MadeModel(
        folder=folder, num_layers=num_layers, num_experts=num_experts, top_k=config["num_experts_per_tok"],
        expert_bytes=sum(tensor.num_elements for tensor in stacks) * item_bytes // (num_layers * num_experts),
        resident_bytes=sum(tensor.num_elements for tensor in tensors if not tensor.experts) * item_bytes,
        embedding_bytes=vocab_size * config["hidden_size"] * item_bytes,
    )  # fmt: skip


def _tensors(folder: Path) -> Iterator[_Tensor]:
    """Names and shapes as transformers' own model of this configuration has them, experts first."""
    config = AutoConfig.from_pretrained(folder)
    from_config: Any = AutoModelForCausalLM.from_config  # untyped in transformers
    with torch.device("meta"):
        model = from_config(config)
    # Experts first: the data begins on a page, their sizes are whole pages, so direct reads need no bytes beside them.
    for name, weight in sorted(model.state_dict().items(), key=lambda item: (".experts." not in item[0], item[0])):
        yield _Tensor(name=name, shape=tuple(weight.shape), experts=".experts." in name)


def _write(path: Path, tensors: list[_Tensor], *, dtype: str, seed: int, num_layers: int) -> None:
    """The safetensors file: several threads, each piece at its own place."""
    torch_dtype, dtype_name = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, offset = [], 0
    for tensor in tensors:
        starts.append(offset)
        offset += tensor.num_elements * torch_dtype.itemsize
        header[tensor.name] = {"dtype": dtype_name, "shape": tensor.shape, "data_offsets": [starts[-1], offset]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * ((-len(text) - 8) % PAGE_BYTES)
    num_in_experts = sum(tensor.num_elements for tensor in tensors if tensor.experts)
    draw = _Draw(torch_dtype, seed=seed, num_layers=num_layers, num_in_experts=num_in_experts)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(NUM_WRITERS) as writers:
        file.write(len(text).to_bytes(8, "little") + text)
        jobs = [
            writers.submit(_write_at, file.fileno(), 8 + len(text) + start + at, piece)
            for tensor, start in zip(tensors, starts, strict=True)
            for at, piece in draw.pieces(tensor)
        ]
        for job in jobs:
            job.result()


def _write_at(file: int, position: int, draw: Callable[[], torch.Tensor]) -> None:
    view = draw().view(torch.uint8).numpy().data
    while view:
        written = os.pwrite(file, view, position)
        position, view = position + written, view[written:]


class _Draw:
    """The numbers of each tensor."""

    def __init__(self, dtype: torch.dtype, *, seed: int, num_layers: int, num_in_experts: int) -> None:
        self._dtype, self._seed = dtype, seed
        self._output_factor = 1 / math.sqrt(2 * num_layers)
        self._offsets = min(POOL_ELEMENTS, num_in_experts)
        generator = torch.Generator().manual_seed(seed)
        pool = torch.randn(self._offsets + PIECE_ELEMENTS, generator=generator).mul_(DEVIATION)
        self._pools = {output: (pool * self._factor(output)).to(dtype) for output in (False, True)}
        self._cut = 0

    def _factor(self, output: bool) -> float:
        return self._output_factor if output else 1.0

    def pieces(self, tensor: _Tensor) -> Iterator[tuple[int, Callable[[], torch.Tensor]]]:
        """(byte offset in the tensor, what gives the flat numbers there) until the tensor is full."""
        output = OUTPUT_NAME.search(tensor.name) is not None
        if not tensor.experts:
            yield 0, partial(self._drawn, tensor, output=output)
            return
        pool, at = self._pools[output], 0
        while at < tensor.num_elements:
            self._cut = (self._cut + STEP_ELEMENTS) % self._offsets
            size = min(PIECE_ELEMENTS, tensor.num_elements - at)
            yield at * self._dtype.itemsize, partial(pool.narrow, 0, self._cut, size)
            at += size

    def _drawn(self, tensor: _Tensor, *, output: bool) -> torch.Tensor:
        if len(tensor.shape) == 1:
            return torch.ones(tensor.shape, dtype=self._dtype)
        deviation = EMBEDDING_DEVIATION if "embed_tokens" in tensor.name else DEVIATION * self._factor(output)
        generator = torch.Generator().manual_seed((self._seed << 32) + zlib.crc32(tensor.name.encode()))
        return torch.randn(tensor.num_elements, generator=generator).mul_(deviation).to(self._dtype)
