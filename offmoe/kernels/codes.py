"""Places of a quantised matrix's codes, scales and zero points in a slot, as numbers that a kernel takes. No Triton.

All formats but GGUF's look alike to a kernel: words of 32 bits hold 8 codes of 4 bits or 4 of 8, lowest bits first, and
four words in a row, 16 bytes, are a *span*: 32 columns or 16, which share a scale and a zero point. GGUF's blocks hold
codes and scales in an order of their own (`triton_gguf`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from offmoe.checkpoint.expert_index import ExpertPart, QuantPart
from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantKind
from offmoe.formats.dense import STORED_DTYPES

WORD_BYTES = 4
SPAN_WORDS = 4
BLOCK_SPAN = 16
_FLOAT_SCALES = ("F32", "BF16", "F16")
_CODE_TYPES = {"int8": ("I32", "I8"), "int4": ("I32",), "mxfp4": ("U8",), "fp8": ("F8_E4M3",)}
# Of GGUF's kinds those that the kernels read: what is taken from a code, and bits that it has beside its nibble.
_OFFSETS = {"q4_0": 8, "q8_0": 128, "q4_k": 0, "q5_k": 0, "q6_k": 32, "mxfp4_gguf": 0}
_UPPER_BITS = {"q5_k": 1, "q6_k": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """A format as a kernel takes it. Bases and strides are in elements of the scales' and the zeros' own type.

    `bits` of a code; `is_integer`: an integer, otherwise a small float. `is_signed`: two's complement, as its zeros.
    `group` columns of `group_rows` rows share a scale. `zero_rows` rows share an element of zeros, 0: there are none.
    An up projection lies `pair_rows` rows, and `scale_pair` and `zero_pair` elements, from its gate.
    """

    bits: int
    is_integer: bool
    is_signed: bool
    group: int
    group_rows: int
    is_exponent: bool
    scale_bytes: int
    scale_base: int
    scale_out_stride: int
    scale_in_stride: int
    zero_rows: int = 0
    zero_bytes: int = WORD_BYTES
    zero_base: int = 0
    zero_out_stride: int = 0
    zero_in_stride: int = 0
    pair_rows: int = 0
    scale_pair: int = 0
    zero_pair: int = 0
    scale_type: str = "BF16"
    zero_type: str = "I32"

    @property
    def is_blocks(self) -> bool:
        """Tells it from `Blocks`."""
        return False

    @property
    def itemsize(self) -> int:
        """Bytes of what a matrix counts in: words."""
        return WORD_BYTES

    @property
    def codes_a_word(self) -> int:
        """Columns that a word holds."""
        return 32 // self.bits

    @property
    def num_in_place(self) -> int:
        """Codes of a word within the 23 bits of float32's mantissa; the others are, `shift` further down."""
        return 5 if self.bits == 4 else 2

    @property
    def shift(self) -> int:
        """See `num_in_place`."""
        return 12 if self.bits == 4 else 16

    @property
    def at_zero(self) -> Codes:
        """The same at the slot's start: what parts that are alike have in common."""
        return replace(self, scale_base=0, zero_base=0)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Numbers of a kind of GGUF block that a kernel takes. A matrix of blocks counts in bytes."""

    kind: QuantKind

    @property
    def is_blocks(self) -> bool:
        """Tells it from `Codes`."""
        return True

    @property
    def itemsize(self) -> int:
        """Bytes of what a matrix counts in."""
        return 1

    @property
    def bits(self) -> int:
        """Bits of a column's share of the codes' bytes as they are loaded: nibbles come twice."""
        return 8

    @property
    def codes_a_word(self) -> int:
        """Columns for each 4 bytes of a row, about."""
        return 4 if self.kind == "q8_0" else 8

    @property
    def num_columns(self) -> int:
        """Columns of a block."""
        return BLOCK_KINDS[self.kind].num_columns

    @property
    def num_spans(self) -> int:
        """Spans of 16 columns in a block."""
        return self.num_columns // BLOCK_SPAN

    @property
    def num_bytes(self) -> int:
        """Bytes of a block."""
        return BLOCK_KINDS[self.kind].num_bytes

    @property
    def first_code(self) -> int:
        """Offset of the bytes that have a nibble of each code; they end the block, but for q6_k's, which begin it."""
        return 0 if self.kind == "q6_k" else self.num_bytes - self.num_columns // 2

    @property
    def scale_at(self) -> int:
        """Offset of the float16 scale."""
        return 208 if self.kind == "q6_k" else 0

    @property
    def offset(self) -> int:
        """Number that is subtracted from a code."""
        return _OFFSETS[self.kind]

    @property
    def upper_bits(self) -> int:
        """Bits of a code that lie apart from its nibble."""
        return _UPPER_BITS.get(self.kind, 0)

    @property
    def has_minima(self) -> bool:
        """Whether a group has a minimum beside its scale."""
        return self.kind in ("q4_k", "q5_k")

    @property
    def at_zero(self) -> Blocks:
        """See `Codes.at_zero`."""
        return self


def codes_of(part: QuantPart, offsets: tuple[int, ...]) -> Codes | Blocks:
    """The numbers for a part whose sources begin at `offsets`, bytes from the slot's start. Ask `obstacle` first."""
    if part.format.is_blocks:
        return Blocks(part.format.kind)
    format_, scales, zeros = part.format, part.scales, part.zeros
    assert scales is not None, f"{part=}"
    scale_bytes, bits = _itemsize(scales), _bits(part)
    found = Codes(
        bits=bits, is_integer=format_.kind in ("int4", "int8"), is_signed=part.codes.dtype == "I8",
        group=format_.group, group_rows=format_.group_rows, is_exponent=format_.scale_dtype == "U8",
        scale_bytes=scale_bytes, scale_base=offsets[scales.source_idx] // scale_bytes + scales.offset,
        scale_out_stride=scales.strides[0], scale_in_stride=scales.strides[1], scale_type=scales.dtype,
    )  # fmt: skip
    if zeros is None:
        return found
    zero_bytes = _itemsize(zeros)
    return replace(
        found, zero_rows=32 // bits if zeros.dtype == "I32" else 1, zero_bytes=zero_bytes,
        zero_base=offsets[zeros.source_idx] // zero_bytes + zeros.offset, zero_out_stride=zeros.strides[0],
        zero_in_stride=zeros.strides[1], zero_type=zeros.dtype,
    )  # fmt: skip


def first_word(part: QuantPart, offsets: tuple[int, ...]) -> tuple[int, int]:
    """(words from the slot's start to the first code, words from one row to the next); of blocks bytes."""
    itemsize, unit = _itemsize(part.codes), 1 if part.format.is_blocks else WORD_BYTES
    begin = offsets[part.codes.source_idx] + part.codes.offset * itemsize
    return begin // unit, part.codes.strides[0] * itemsize // unit


def obstacle(part: QuantPart) -> str | None:
    """Why the kernels cannot read a part, None if they can: a reason for people."""
    format_, (_, num_in) = part.format, part.shape
    if format_.is_blocks:
        return None if format_.kind in _OFFSETS else f"{format_.name} blocks have no kernel"
    assert part.scales is not None, f"{part=}"
    itemsize, per_word = _itemsize(part.codes), 32 // _bits(part)
    span = SPAN_WORDS * per_word
    row_bytes, begin = part.codes.strides[0] * itemsize, part.codes.offset * itemsize
    scale_types = ("U8",) if format_.scale_dtype == "U8" else _FLOAT_SCALES
    checks = (
        (part.codes.dtype in _CODE_TYPES[format_.kind], f"{format_.kind} codes are stored as {part.codes.dtype}"),
        (part.scales.dtype in scale_types, f"scales are stored as {part.scales.dtype}"),
        (
            format_.group % span == 0 or format_.group >= num_in,
            f"groups of {format_.group} columns are no multiple of {span}",
        ),
        (num_in % per_word == 0, f"{num_in} columns are no multiple of {per_word}"),
        (part.codes.strides[1] == 1, f"codes lie {part.codes.strides[1]} apart"),
        (row_bytes % WORD_BYTES == 0 and begin % WORD_BYTES == 0, "rows of codes do not begin at whole words"),
    )
    return next((reason for passed, reason in checks if not passed), None)


def _bits(part: QuantPart) -> int:
    return 4 if part.format.kind in ("int4", "mxfp4") else 8


def _itemsize(part: ExpertPart) -> int:
    return STORED_DTYPES[part.dtype].itemsize
