"""One tensor as a safetensors header describes it."""

from __future__ import annotations

from dataclasses import dataclass

# Bits an element, by the names of the safetensors format. Those that offmoe does not compute with are known too, so
# that a checkpoint holding one is described rather than called damaged.
ITEM_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOAT_TYPES = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Place of a tensor. `start` is the absolute byte in the file, `dtype` the name in the format ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file_idx: int
    start: int
    num_bytes: int
