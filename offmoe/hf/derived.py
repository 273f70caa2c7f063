"""The values of tensors that a GGUF file holds in another arrangement than the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from offmoe.checkpoint.derived import DerivationStep, DerivedEntry, Way
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.quantised import QuantEntry
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.formats.quantised import QuantMatrix
from offmoe.hf.stored import read_tensor, values_of


def derive(index: CheckpointIndex, entry: DerivedEntry, dtype: torch.dtype) -> torch.Tensor:
    """`entry` as the model wants it. What was quantised becomes `dtype`, what was not keeps its type.

    Source: `permute` and `modify_tensors` of llama.cpp's converters.
    """
    tensors = [_values(index, source, dtype) for source in entry.sources]
    for step in entry.steps:
        tensors = [_done(step, tensors, entry.shape)]
    return tensors[0].reshape(entry.shape)


def _done(step: DerivationStep, tensors: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    return _WAYS[step.way](tensors, step.numbers, shape)


_Numbers: TypeAlias = tuple[int, ...]
_Shape: TypeAlias = tuple[int, ...]


def _reshape(tensors: list[torch.Tensor], _: _Numbers, shape: _Shape) -> torch.Tensor:
    return tensors[0].reshape(shape)


def _rows(tensors: list[torch.Tensor], _: _Numbers, shape: _Shape) -> torch.Tensor:
    return torch.cat(tensors, dim=0)


def _less_one(tensors: list[torch.Tensor], _: _Numbers, shape: _Shape) -> torch.Tensor:
    return (tensors[0].float() - 1.0).to(tensors[0].dtype)


def _log(tensors: list[torch.Tensor], _: _Numbers, shape: _Shape) -> torch.Tensor:
    return torch.log(-tensors[0].float()).to(tensors[0].dtype)


def _unrotate(tensors: list[torch.Tensor], numbers: _Numbers, shape: _Shape) -> torch.Tensor:
    (heads,), tensor = numbers, tensors[0]
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _untile(tensors: list[torch.Tensor], numbers: _Numbers, shape: _Shape) -> torch.Tensor:
    axis, begin, groups, of_a_group, size = numbers
    kept, tiled = tensors[0].split([begin, tensors[0].shape[axis] - begin], dim=axis)
    apart = tiled.unflatten(axis, (of_a_group, groups, size)).transpose(axis, axis + 1)
    return torch.cat([kept, apart.flatten(axis, axis + 2)], dim=axis)


def _ungroup(tensors: list[torch.Tensor], numbers: _Numbers, shape: _Shape) -> torch.Tensor:
    groups, *sizes = numbers
    parts = [*tensors[0].split(sizes), *tensors[1:]]
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _pairs(tensors: list[torch.Tensor], _: _Numbers, shape: _Shape) -> torch.Tensor:
    return torch.stack(tensors, dim=-1).view(shape)


def _latent(tensors: list[torch.Tensor], _: _Numbers, shape: _Shape) -> torch.Tensor:
    keys_HRK, values_HVR = tensors
    return torch.cat([keys_HRK.transpose(1, 2), values_HVR], dim=1).reshape(shape)


_WAYS: dict[Way, Callable[[list[torch.Tensor], _Numbers, _Shape], torch.Tensor]] = {
    "reshape": _reshape, "rows": _rows, "less_one": _less_one, "log": _log, "unrotate": _unrotate, "untile": _untile,
    "ungroup": _ungroup, "pairs": _pairs, "latent": _latent,
}  # fmt: skip


def _values(index: CheckpointIndex, source: TensorEntry | QuantEntry, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(source, TensorEntry):
        return read_tensor(index, source)
    codes = read_tensor(index, source.codes).view(-1, source.codes.shape[-1])
    matrix = QuantMatrix(source.format, (len(codes), source.shape[-1]), codes, None, None)
    return values_of(matrix, dtype).view(source.shape)
