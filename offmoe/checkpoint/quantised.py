"""From the tensors of a quantised checkpoint to the matrices that they are: codes, scales and zero points as one entry.

After this the key mapping sees plain names: `X.weight_packed` with `X.weight_scale`, `X.weight` with
`X.weight_scale_inv` and `X_blocks` with `X_scales` are `X.weight`, `X.weight` and `X`. Headers are hostile input: every
count is checked against every other before anything is read. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from offmoe.checkpoint.expert_index import ExpertPart, QuantPart
from offmoe.checkpoint.quant_config import CHANNEL, Quantisation
from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.core.errors import CheckpointError, UnsupportedModelError

WORD_BITS = 32
MXFP4_GROUP = 32
SCALE_TYPES = ("BF16", "F16", "F32")
ReadBytes = Callable[[TensorEntry], bytes]
_PACKED, _BLOCKS = ".weight_packed", "_blocks"
# What compressed-tensors stores beside a weight, and offmoe needs not: it computes with unquantised activations.
_BESIDE = ("_scale", "_zero_point", "_shape")
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantEntry:
    """A quantised tensor. `shape` is the logical one: (N, K), or (experts, N, K) where they are stacked."""

    name: str
    shape: tuple[int, ...]
    format: QuantFormat
    codes: TensorEntry
    scales: TensorEntry | None
    zeros: TensorEntry | None = None

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """The tensors that it is stored as."""
        return tuple(entry for entry in (self.codes, self.scales, self.zeros) if entry is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(entry.num_bytes for entry in self.stored)

    @property
    def dtype(self) -> str:
        """For messages: how it is quantised."""
        return self.format.name


def join_quantised(
    tensors: Mapping[str, TensorEntry], quantisation: Quantisation | None, read: ReadBytes
) -> dict[str, TensorEntry | QuantEntry]:
    """The logical tensors. `read` gives a small tensor's bytes, where shapes alone leave the number of bits open.

    Raises CheckpointError, naming tensors and numbers, when parts are missing or contradict each other.
    """
    if quantisation is None:
        return dict(tensors)
    join = {"compressed-tensors": _join_compressed, "fp8": _join_fp8, "mxfp4": _join_mxfp4}[quantisation.method]
    found: dict[str, QuantEntry] = {}
    taken: set[str] = set()
    for name, entry in tensors.items():
        joined = join(name, entry, tensors, quantisation, read)
        if joined is None:
            continue
        if joined.name in found or (joined.name in tensors and joined.name != name):
            raise CheckpointError(f"{joined.name!r} is in the checkpoint twice, plain and quantised; download it again")
        found[joined.name] = joined
        taken |= {name, *(part.name for part in joined.stored)}
        taken |= {joined.name + suffix for suffix in _BESIDE}
        taken |= {joined.name.removesuffix("weight") + suffix for suffix in _ACTIVATIONS}
    if not found:
        raise CheckpointError(
            f"config.json says that the checkpoint is quantised ({quantisation.method}), but none of its "
            f"{len(tensors)} tensors is; config and tensors are of different models"
        )
    rest = {name: entry for name, entry in tensors.items() if name not in taken}
    lost = next((name for name in rest if name.endswith((".weight_scale", ".weight_scale_inv"))), None)
    if lost is not None:
        raise CheckpointError(f"the checkpoint has {lost!r} without the weights that it scales; download it again")
    return {**rest, **found}


def quant_part(
    entry: QuantEntry, sources: tuple[int, ...], *, first_row: int, num_rows: int, row_step: int
) -> QuantPart | None:
    """Rows `first_row`, `first_row + row_step`, ... of one expert's matrix; None where scales or zeros span others.

    `sources` are the numbers of the codes', scales' and zero points' sources.
    """
    rows, form = (first_row, num_rows, row_step), entry.format
    zeros_per_row = 1
    if entry.zeros is not None and entry.zeros.dtype == "I32":
        zeros_per_row = WORD_BITS // _bits(form)
    per = max(form.group_rows, zeros_per_row)
    if per > 1 and (row_step != 1 or first_row % per):
        return None
    return QuantPart(
        format=form, shape=(num_rows, entry.shape[-1]),
        codes=_rows(entry.codes, sources[0], rows, _code_columns(entry), 1),
        scales=None if entry.scales is None
        else _rows(entry.scales, sources[1], rows, entry.scales.shape[-1], form.group_rows),
        zeros=None if entry.zeros is None
        else _rows(entry.zeros, sources[2], rows, entry.zeros.shape[-1], zeros_per_row),
    )  # fmt: skip


def _rows(entry: TensorEntry, source: int, rows: tuple[int, int, int], columns: int, per: int) -> ExpertPart:
    first, count, step = rows
    return ExpertPart(
        source_idx=source, offset=first // per * columns, shape=(-(-count // per), columns),
        strides=(step * columns, 1), dtype=entry.dtype,
    )  # fmt: skip


def _code_columns(entry: QuantEntry) -> int:
    """Elements of the codes in one row."""
    return entry.shape[-1] // 2 if entry.format.kind == "mxfp4" else entry.codes.shape[-1]


def _bits(form: QuantFormat) -> int:
    return 4 if form.kind == "int4" else 8


def _join_compressed(
    name: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry], quantisation: Quantisation, read: ReadBytes
) -> QuantEntry | None:
    if name.endswith(_PACKED) or (name.endswith(".weight") and entry.dtype == "I8"):
        return _integers(name, entry, tensors, quantisation, read)
    if not name.endswith(".weight") or entry.dtype != "F8_E4M3":
        return None
    scales = _beside(tensors, name, "_scale", name)
    if CHANNEL in quantisation.groups and scales.shape == (*entry.shape[:-1], 1):
        return _scaled_floats(entry, scales, (1, entry.shape[-1]))
    if quantisation.block is None:
        raise _contradiction(entry, scales, "a scale a row")
    return _scaled_floats(entry, scales, quantisation.block)


def _integers(
    name: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry], quantisation: Quantisation, read: ReadBytes
) -> QuantEntry:
    packed = name.endswith(_PACKED)
    base = name.removesuffix("_packed")
    scales = _beside(tensors, base, "_scale", name)
    if f"{base}_g_idx" in tensors:
        raise UnsupportedModelError(f"{name!r} has its columns reordered ({base}_g_idx), which is not read yet")
    if packed:
        _check(entry, "I32")
        bits = _packed_bits(entry, tensors.get(f"{base}_shape"), quantisation, read)
        per_word = WORD_BITS // bits
    else:
        _check(entry, "I8")
        bits, per_word = 8, 1
    *lead, num_rows, words = entry.shape
    width = words * per_word
    num_groups = scales.shape[-1] if scales.shape else 0
    if scales.shape != (*lead, num_rows, num_groups) or num_groups < 1 or width % num_groups:
        raise _contradiction(entry, scales, f"{num_rows} rows of {width} columns")
    group = width // num_groups
    if group not in quantisation.groups and not (num_groups == 1 and CHANNEL in quantisation.groups):
        wanted = ", ".join("a whole row" if size == CHANNEL else str(size) for size in sorted(quantisation.groups))
        raise CheckpointError(
            f"config.json says groups of {wanted}, {scales.name!r} has one scale for {group} columns; config and "
            "tensors are of different models"
        )
    _check(scales, *SCALE_TYPES)
    zeros = tensors.get(f"{base}_zero_point")
    if zeros is not None:
        _check(zeros, "I32" if packed else "I8")
        rows = -(-num_rows // per_word)
        if zeros.shape != (*lead, rows, num_groups):
            raise _contradiction(entry, zeros, f"{rows} rows of {num_groups} zero points")
    form = QuantFormat(
        kind="int4" if bits == 4 else "int8", group=group, symmetric=zeros is None,
        offset=1 << (bits - 1) if packed else 0, scale_dtype=scales.dtype,
    )  # fmt: skip
    return QuantEntry(name=base, shape=(*lead, num_rows, width), format=form, codes=entry, scales=scales, zeros=zeros)


def _packed_bits(entry: TensorEntry, shape: TensorEntry | None, quantisation: Quantisation, read: ReadBytes) -> int:
    """The only number of bits that config.json knows, or the one that fits the width in `weight_shape`."""
    if len(quantisation.num_bits) == 1:
        return next(iter(quantisation.num_bits))
    if shape is None or shape.dtype not in ("I32", "I64") or shape.shape != (2,):
        raise CheckpointError(
            f"{entry.name!r} comes without a weight_shape of two numbers, and config.json says "
            f"{sorted(quantisation.num_bits)} bits; download the checkpoint again"
        )
    width = int.from_bytes(read(shape)[shape.num_bytes // 2 :], "little", signed=True)
    for bits in sorted(quantisation.num_bits):
        if entry.shape[-1] * WORD_BITS == width * bits:
            return bits
    raise CheckpointError(
        f"{entry.name!r} has {entry.shape[-1]} words a row for {width} columns: that is neither of "
        f"{sorted(quantisation.num_bits)} bits; download the checkpoint again"
    )


def _join_fp8(
    name: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry], quantisation: Quantisation, read: ReadBytes
) -> QuantEntry | None:
    if entry.dtype != "F8_E4M3":
        return None
    assert quantisation.block is not None, "fp8 always names its blocks"
    return _scaled_floats(entry, _beside(tensors, name, "_scale_inv", name), quantisation.block)


def _scaled_floats(entry: TensorEntry, scales: TensorEntry, block: tuple[int, int]) -> QuantEntry:
    _check(entry, "F8_E4M3")
    _check(scales, *SCALE_TYPES)
    block_rows, block_columns = block
    *lead, num_rows, width = entry.shape
    if scales.shape != (*lead, -(-num_rows // block_rows), -(-width // block_columns)):
        raise _contradiction(entry, scales, f"blocks of {block_rows} x {block_columns}")
    form = QuantFormat(kind="fp8", group=block_columns, group_rows=block_rows, scale_dtype=scales.dtype)
    return QuantEntry(name=entry.name, shape=entry.shape, format=form, codes=entry, scales=scales)


def _join_mxfp4(
    name: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry], quantisation: Quantisation, read: ReadBytes
) -> QuantEntry | None:
    if not name.endswith(_BLOCKS) or entry.dtype != "U8":
        return None
    base = name.removesuffix(_BLOCKS)
    scales = _beside(tensors, base, "_scales", name)
    _check(scales, "U8")
    if len(entry.shape) not in (3, 4) or entry.shape[-1] * 2 != MXFP4_GROUP or 0 in entry.shape:
        raise CheckpointError(f"{name!r} has shape {list(entry.shape)}; mxfp4 blocks are (..., rows, columns / 32, 16)")
    if scales.shape != entry.shape[:-1]:
        raise _contradiction(entry, scales, f"one scale for {MXFP4_GROUP} columns")
    shape = (*entry.shape[:-2], entry.shape[-2] * MXFP4_GROUP)
    form = QuantFormat(kind="mxfp4", group=MXFP4_GROUP, scale_dtype="U8")
    return QuantEntry(name=base, shape=shape, format=form, codes=entry, scales=scales)


def _beside(tensors: Mapping[str, TensorEntry], base: str, suffix: str, name: str) -> TensorEntry:
    found = tensors.get(base + suffix)
    if found is None:
        raise CheckpointError(f"{name!r} has no scales: there is no {base + suffix!r}; download the checkpoint again")
    return found


def _check(entry: TensorEntry, *types: str) -> None:
    if entry.dtype not in types:
        raise CheckpointError(f"{entry.name!r} is stored as {entry.dtype}, known here: {', '.join(types)}")
    if len(entry.shape) not in (2, 3) or 0 in entry.shape:
        raise CheckpointError(f"{entry.name!r} has shape {list(entry.shape)}; two or three dimensions are needed")


def _contradiction(entry: TensorEntry, other: TensorEntry, what: str) -> CheckpointError:
    return CheckpointError(
        f"{entry.name!r} is {list(entry.shape)}, {other.name!r} is {list(other.shape)}: that does not fit {what}; "
        "download the checkpoint again"
    )
