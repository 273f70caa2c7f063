"""A slot's bytes as an expert's matrices, without a copy: plain (float32, bfloat16, float16) or quantised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from offmoe.checkpoint.expert_index import ExpertPart, MoeLayer, QuantPart
from offmoe.core.errors import CheckpointError
from offmoe.formats.quantised import QuantMatrix

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
}  # fmt: skip
# What codes, scales and zero points of quantised matrices are stored as.
STORED_DTYPES = TORCH_DTYPES | {
    "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert's matrices as views of a slot, each a tuple of parts to be joined along the output dimension.

    Valid while the slot is READY and held. F expert width, D model width: `up` parts join to (2F, D) or (F, D),
    `down` parts to (D, F); the other way round when the layer is transposed, except quantised ones.
    """

    up: tuple[torch.Tensor | QuantMatrix, ...]
    down: tuple[torch.Tensor | QuantMatrix, ...]

    @property
    def num_weights(self) -> int:
        """Numbers in all matrices, however they are stored."""
        return sum(math.prod(part.shape) for part in (*self.up, *self.down))


def view_expert(layer: MoeLayer, slot: torch.Tensor, source_offsets: tuple[int, ...]) -> ExpertWeights:
    """Cut a slot (uint8) into the layer's matrices; `source_offsets` say where in the slot each source begins."""
    return ExpertWeights(
        up=_parts(layer.up, slot, source_offsets, layer.transposed),
        down=_parts(layer.down, slot, source_offsets, layer.transposed),
    )


def writable_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, for a read to fill."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def torch_dtype(name: str, *, where: str) -> torch.dtype:
    """The torch type of a safetensors type name; CheckpointError naming `where` for one that is no dense format."""
    dtype = TORCH_DTYPES.get(name)
    if dtype is None:
        raise CheckpointError(f"{where} is stored as {name}; dense experts are read as {', '.join(TORCH_DTYPES)}")
    return dtype


def _parts(
    parts: tuple[ExpertPart | QuantPart, ...], slot: torch.Tensor, source_offsets: tuple[int, ...], transposed: bool
) -> tuple[torch.Tensor | QuantMatrix, ...]:
    views = [_matrix(part, slot, source_offsets) for part in parts]
    if transposed:
        return tuple(views)
    joined = [views[0]]
    for view in views[1:]:
        joined[-1:] = _join(joined[-1], view)
    return tuple(joined)


def _matrix(
    part: ExpertPart | QuantPart, slot: torch.Tensor, source_offsets: tuple[int, ...]
) -> torch.Tensor | QuantMatrix:
    if isinstance(part, ExpertPart):
        return _view(part, slot, source_offsets)
    return QuantMatrix(
        part.format,
        part.shape,
        _view(part.codes, slot, source_offsets),
        None if part.scales is None else _view(part.scales, slot, source_offsets),
        None if part.zeros is None else _view(part.zeros, slot, source_offsets),
    )


def _view(part: ExpertPart, slot: torch.Tensor, source_offsets: tuple[int, ...]) -> torch.Tensor:
    dtype, begin = STORED_DTYPES[part.dtype], source_offsets[part.source_idx]
    if begin % dtype.itemsize:  # a header of odd length: the one case that costs a copy
        last = part.offset + sum((n - 1) * s for n, s in zip(part.shape, part.strides, strict=True)) + 1
        slot, begin = slot[begin : begin + last * dtype.itemsize].clone(), 0
    typed = slot[begin : begin + (slot.numel() - begin) // dtype.itemsize * dtype.itemsize].view(dtype)
    return typed.as_strided(part.shape, part.strides, typed.storage_offset() + part.offset)


def _join(first: torch.Tensor | QuantMatrix, second: torch.Tensor | QuantMatrix) -> list[torch.Tensor | QuantMatrix]:
    """One matrix when `second` begins where `first` ends (gate and up side by side on disk), else both."""
    if isinstance(first, QuantMatrix) or isinstance(second, QuantMatrix):
        return [first, second]
    rows, columns = first.shape
    adjacent = (
        first.is_contiguous()
        and second.is_contiguous()
        and second.shape[1] == columns
        and second.dtype == first.dtype
        and second.data_ptr() == first.data_ptr() + first.nbytes
    )
    if not adjacent:
        return [first, second]
    return [first.as_strided((rows + second.shape[0], columns), first.stride())]
