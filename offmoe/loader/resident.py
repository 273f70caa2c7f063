"""Resident weights: counted from the meta model, then read group by group and put where the model computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import EllipsisType

import torch
from transformers import PreTrainedModel

from offmoe.checkpoint.derived import DerivedEntry, StoredTensor
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.quantised import QuantEntry
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.core.errors import CheckpointError
from offmoe.formats.packed_sizes import BATCH_BYTES
from offmoe.hf.derived import derive
from offmoe.hf.internals import KeyMapping, ResidentLoader, Target
from offmoe.hf.stored import read_matrix, read_tensor, values_of
from offmoe.loader.packed_weights import PackedWeight, WeightPacker, is_packed
from offmoe.tiers.huge_pages import in_huge_pages


class LazyTensor:
    """A tensor that is read when `lazy[...]` asks for it, as a safetensors slice is; a quantised one as `dtype`."""

    def __init__(self, index: CheckpointIndex, entry: StoredTensor, dtype: torch.dtype) -> None:
        self._index, self._entry, self._dtype = index, entry, dtype

    def __getitem__(self, item: EllipsisType) -> torch.Tensor:
        if isinstance(self._entry, DerivedEntry):
            return derive(self._index, self._entry, self._dtype)
        if isinstance(self._entry, QuantEntry):
            return values_of(read_matrix(self._index, self._entry), self._dtype)
        return read_tensor(self._index, self._entry)


def resident_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model's own parameters and buffers, tied ones counted once. Experts must be dropped before."""
    tied = set(model.all_tied_weights_keys)
    params = sum(_stored_bytes(p) for name, p in model.named_parameters() if name not in tied)
    buffers: int = sum(buffer.nbytes for buffer in model.buffers())
    return params + buffers


def _stored_bytes(param: torch.nn.Parameter) -> int:
    weight: object = param
    return weight.stored_bytes if isinstance(weight, PackedWeight) else param.nbytes


def load_resident(
    model: PreTrainedModel, index: CheckpointIndex, mapping: KeyMapping, targets: dict[str, Target],
    expert_keys: set[str], progress: Callable[[int, int], None], device: torch.device | None = None,
    packer: WeightPacker | None = None,
) -> None:  # fmt: skip
    """Read everything but `expert_keys`. `progress(done_bytes, total_bytes)` is called after each batch.

    With a `device` each batch goes there before the next one is read, so that RAM never holds more than one
    (`load_peak_bytes`); buffers that are in no file go there last. Tied weights are one tensor wherever they are. With
    a `packer` weights are packed as they come.
    Raises CheckpointError when parameters stay without weights, or shapes differ from config.json.
    """
    dtype = model.dtype
    given = {name for name, param in model.named_parameters() if not param.is_meta}
    loader = ResidentLoader(model, mapping, dtype)
    keys = [key for key in targets if key not in expert_keys]
    total, done = sum(index.tensors[key].num_bytes for key in keys), 0
    for batch in _batches(keys, targets, index, dtype):
        loader.load({key: LazyTensor(index, index.tensors[key], dtype) for key in batch})
        if device is not None:
            _move_parameters(model, device)
        if packer is not None:
            packer.pack_loaded()
        done += sum(index.tensors[key].num_bytes for key in batch)
        progress(done, total)
    report = loader.finish()
    if report.mismatched or report.errors:
        first = " ".join((report.mismatched + report.errors)[0].split())
        raise CheckpointError(f"{first}; config and tensors are of different models")
    # A buffer that no tensor was for has a value all the same: the one that training starts from.
    empty = sorted({name for name, param in model.named_parameters() if param.is_meta} | (report.missing - given))
    if empty:
        raise CheckpointError(
            f"the checkpoint has no tensor for {len(empty)} weights that config.json asks for, first {empty[0]!r}; "
            "config and tensors are of different models"
        )
    assert not any(buffer.is_meta for buffer in model.buffers()), "a buffer was left on the meta device"
    if device is not None:
        model.to(device)
        return
    if packer is not None:  # weights that are tied to others
        packer.pack_loaded()
    for param in model.parameters():  # one at a time: the largest is there twice for a moment
        if not is_packed(param):
            param.data = in_huge_pages(param.data)


def load_peak_bytes(
    targets: dict[str, Target], expert_keys: set[str], index: CheckpointIndex, dtype: torch.dtype
) -> int:
    """The most that `load_resident` has in RAM at once for a device: a batch, and one parameter's converted copy."""
    keys = [key for key in targets if key not in expert_keys]
    groups = [_read_bytes(group, index, dtype) for group in _groups(keys, targets)]
    batches = [_read_bytes(batch, index, dtype) for batch in _batches(keys, targets, index, dtype)]
    return max(batches, default=0) + max(groups, default=0)


def _move_parameters(model: PreTrainedModel, device: torch.device) -> None:
    """Move what has been read so far to `device`. The parameters stay the same objects, so ties hold."""
    for param in model.parameters():
        if not param.is_meta and param.device != device:
            param.data = param.data.to(device)


def _read_bytes(keys: list[str], index: CheckpointIndex, dtype: torch.dtype) -> int:
    """Bytes that these tensors take in RAM once they are read: quantised ones as they are stored, and as values."""
    entries = [index.tensors[key] for key in keys]
    values = sum(math.prod(entry.shape) for entry in entries if not isinstance(entry, TensorEntry))
    return sum(entry.num_bytes for entry in entries) + values * dtype.itemsize


def _batches(
    keys: list[str], targets: dict[str, Target], index: CheckpointIndex, dtype: torch.dtype
) -> Iterator[list[str]]:
    """Groups of about BATCH_BYTES that never split the parts of one parameter."""
    batch: list[str] = []
    size = 0
    for group in _groups(keys, targets):
        group_bytes = _read_bytes(group, index, dtype)
        if batch and size + group_bytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch += group
        size += group_bytes
    if batch:
        yield batch


def _groups(keys: list[str], targets: dict[str, Target]) -> list[list[str]]:
    """The keys of each parameter."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(targets[key].param, []).append(key)
    return list(groups.values())
