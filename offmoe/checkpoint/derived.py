"""Tensors that are not in the files as the model wants them, and are computed from those that are. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offmoe.checkpoint.quantised import QuantEntry
from offmoe.checkpoint.tensor_entry import TensorEntry

# What was done to them: rows of rotated heads reordered, latent attention's keys and values apart, gate and up apart,
# one row without its dimension.
How = Literal["unrotate", "latent", "pairs", "row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedEntry:
    """A resident tensor to be computed from those of the files, in `how`. `heads`: of the rows, where it matters."""

    name: str
    shape: tuple[int, ...]
    how: How
    sources: tuple[TensorEntry | QuantEntry, ...]
    heads: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(source.num_bytes for source in self.sources)

    @property
    def dtype(self) -> str:
        """How it is stored."""
        return self.sources[0].dtype


StoredTensor = TensorEntry | QuantEntry | DerivedEntry
