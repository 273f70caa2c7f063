"""Tensors of a checkpoint that no parameter takes: known to be needless, or an error that names them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.needless import needless_kind, tower_kind
from offmoe.checkpoint.tensor_entry import FLOAT_TYPES, TensorEntry
from offmoe.core.errors import CheckpointError
from offmoe.core.units import format_bytes
from offmoe.hf.internals import KeyMapping, Target, ignored_patterns

BEYOND = "layers beyond num_hidden_layers"
_IN_LAYER = re.compile(r"(.*\b(?:layers|blocks|h))\.(\d+)\.")
_LAYER_PATTERN = re.compile(r"layers\\\.\d")
_SCALES = re.compile(r"(scale|scales|scale_inv|zero_point|qzeros|g_idx|absmax|quant_state\b.*)$")


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Tensors that are not read, by key -> kind."""

    kinds: Mapping[str, str]
    num_bytes: int

    def note(self) -> str | None:
        """One line for people."""
        if not self.kinds:
            return None
        counts = Counter(self.kinds.values())
        parts = ", ".join(f"{count} of {kind}" for kind, count in counts.most_common())
        return (
            f"{len(self.kinds)} tensors ({format_bytes(self.num_bytes)}) are not needed for text and not read: {parts}"
        )


def sort_out(
    model: PreTrainedModel, index: CheckpointIndex, mapping: KeyMapping, targets: Mapping[str, Target],
    expert_keys: Collection[str],
) -> LeftOut:  # fmt: skip
    """The tensors that need not be read.

    Raises CheckpointError for any other tensor that has no parameter: dropped, the model would be another one. And for
    codes that would be read as values: numbers that are no floats, without scales, for a parameter of floats.
    """
    places = _Places(model, mapping)
    kinds: dict[str, str] = {}
    lost: list[str] = []
    for key, target in targets.items():
        if key in expert_keys:
            continue
        if target.param in mapping.params:
            _refuse_codes(index, key, mapping.params[target.param].is_floating_point())
            continue
        kind = places.kind(key, target.param)
        if kind is None:
            lost.append(key)
        else:
            kinds[key] = kind
    if lost:
        raise _no_place(model, index, lost)
    return LeftOut(kinds=kinds, num_bytes=sum(index.tensors[key].num_bytes for key in kinds))


class _Places:
    """Places of a model for tensors that are no parameters."""

    def __init__(self, model: PreTrainedModel, mapping: KeyMapping) -> None:
        self._computed = {name for name, _ in model.named_buffers()} - mapping.params.keys()
        self._ignored = ignored_patterns(model)
        self._last: dict[str, int] = {}
        for name in mapping.params:
            if found := _IN_LAYER.match(name):
                self._last[found[1]] = max(self._last.get(found[1], 0), int(found[2]))
        self._towers = {kind for name in mapping.params if (kind := tower_kind(name)) is not None}

    def kind(self, key: str, param: str) -> str | None:
        """The reason not to read the tensor `key`, which would be `param`; None without any."""
        found = _IN_LAYER.match(param) or _IN_LAYER.match(key)
        last = self._last.get(found[1]) if found else None
        if found and last is not None and int(found[2]) > last:
            return BEYOND
        if param in self._computed:
            return "buffers that are computed"
        kind = needless_kind(key)
        if kind is None and (tower := tower_kind(key)) not in self._towers:
            kind = tower
        if kind is None and any(re.search(pattern, param) for pattern in self._ignored_of(has_layer=last is not None)):
            kind = "parts that transformers leaves out"
        return kind

    def _ignored_of(self, *, has_layer: bool) -> list[str]:
        """Patterns of the class. Those that name a layer's number mean a published model, which had no such layer."""
        return [pattern for pattern in self._ignored if not (has_layer and _LAYER_PATTERN.search(pattern))]


def _refuse_codes(index: CheckpointIndex, key: str, takes_floats: bool) -> None:
    entry = index.tensors[key]
    if takes_floats and isinstance(entry, TensorEntry) and entry.dtype not in FLOAT_TYPES:
        raise CheckpointError(
            f"tensor {key!r} is stored as {entry.dtype}, and config.json names no quantisation that says what its "
            f"values are; use the bfloat16 version (types of plain weights: {', '.join(sorted(FLOAT_TYPES))})"
        )


def _no_place(model: PreTrainedModel, index: CheckpointIndex, lost: list[str]) -> CheckpointError:
    first = min(lost)
    entry = index.tensors[first]
    if _SCALES.search(first):
        what = "the weights are quantised in a way that config.json does not tell; use the bfloat16 version"
    elif first.endswith("bias"):
        what = "config.json may deny them (attention_bias, use_bias), or be of another model"
    else:
        what = "config and tensors are of different models"
    return CheckpointError(
        f"{type(model).__name__} has no place for {len(lost)} of the checkpoint's {len(index.tensors)} tensors, first "
        f"{first!r} ({entry.dtype} {list(entry.shape)}), and without them it would be another model: {what}"
    )
