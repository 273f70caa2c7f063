"""Tensors that are not in the files as the model wants them, and are computed from those that are. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offmoe.checkpoint.quantised import QuantEntry
from offmoe.checkpoint.tensor_entry import TensorEntry

Way = Literal["unrotate", "latent", "pairs", "reshape", "rows", "less_one", "log", "ungroup", "untile"]


@dataclass(frozen=True, slots=True)
class DerivationStep:
    """One thing that is done to stored tensors; `numbers` by `way`:

    unrotate (heads): pairs of rotated rows of each head become two halves
    latent: keys (heads, rank, size) and values (heads, size, rank) become rows of keys and values, head by head
    pairs: the values of two tensors take turns in the last dimension
    reshape: only the shape changes
    rows: several tensors, one below the other
    less_one: 1 is taken away (of norms that are stored with it)
    log: log(-x) (of decays that are stored as -exp(x))
    untile (axis, first, groups, heads of a group, size): from `first` on, heads lie [head of a group][group], and
        become [group][head of a group]
    ungroup (groups, rows, ...): of the parts of the first tensor, so many rows each, and of the other tensors the rows
        of group 0, then those of group 1, ...
    """

    way: Way
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedEntry:
    """A resident tensor to be computed from those of the files, step by step."""

    name: str
    shape: tuple[int, ...]
    steps: tuple[DerivationStep, ...]
    sources: tuple[TensorEntry | QuantEntry, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(source.num_bytes for source in self.sources)

    @property
    def dtype(self) -> str:
        """The stored type."""
        return self.sources[0].dtype


StoredTensor = TensorEntry | QuantEntry | DerivedEntry
