"""The values of tensors that a GGUF file holds in another arrangement than the model."""

from __future__ import annotations

import torch

from offmoe.checkpoint.derived import DerivedEntry
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.quantised import QuantEntry
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.formats.quantised import QuantMatrix
from offmoe.models.stored import read_tensor, values_of


def derive(index: CheckpointIndex, entry: DerivedEntry, dtype: torch.dtype) -> torch.Tensor:
    """`entry` as the model wants it. What was quantised becomes `dtype`, what was not keeps its type.

    Source: `permute` and `modify_tensors` of llama.cpp's converters.
    """
    sources = [_values(index, source, dtype) for source in entry.sources]
    match entry.how:
        case "row":
            return sources[0].view(entry.shape)
        case "unrotate":  # of each head, pairs of rows become two halves
            rows = sources[0].view(entry.heads, -1, 2, *entry.shape[1:])
            return rows.transpose(1, 2).reshape(entry.shape)
        case "pairs":
            return torch.stack(sources, dim=-1).view(entry.shape)
        case "latent":
            keys_HRK, values_HVR = sources
            return torch.cat([keys_HRK.transpose(1, 2), values_HVR], dim=1).reshape(entry.shape)


def _values(index: CheckpointIndex, source: TensorEntry | QuantEntry, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(source, TensorEntry):
        return read_tensor(index, source)
    codes = read_tensor(index, source.codes).view(-1, source.codes.shape[-1])
    matrix = QuantMatrix(source.format, (len(codes), source.shape[-1]), codes, None, None)
    return values_of(matrix, dtype).view(source.shape)
