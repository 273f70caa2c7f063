"""Common properties of the published quantised formats, in one record. No torch.

N outputs = rows, K inputs = columns; every word is little-endian, and the bytes stay as they are on disk.

int4    codes I32 (N, K/8): nibble i of word j is column 8j+i, lowest bits first
        scales float (N, K/group); zeros I32 (ceil(N/8), K/group), packed the same way down the rows
int8    codes I32 (N, K/4): byte i of word j is column 4j+i; or I8 (N, K)
        scales float (N, K/group); zeros I32 (ceil(N/4), K/group), packed down the rows; or I8 (N, K/group)
mxfp4   codes U8 (N, K/2): e2m1, low nibble first; scales U8 (N, K/32): exponents of two, 127 added
fp8     codes F8_E4M3 (N, K); scales float (ceil(N/group_rows), ceil(K/group))

packed  codes U8 (N, 48 * ceil(K/32)), heads of rows and escapes: bfloat16 without loss (`formats/packed.py`)

q4_k... codes U8 (N, K/columns * bytes): GGUF's blocks (`BLOCK_KINDS`), which hold their scales themselves

The first two are compressed-tensors' `pack-quantized` and `int-quantized`, mxfp4 is gpt-oss as published (the OCP
microscaling format), fp8 DeepSeek-V3 as published and compressed-tensors' `float-quantized`. Integers are stored with
`offset` added, zeros with the same: w = ((code - offset) - (zero - offset)) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QuantKind = Literal[
    "int8", "int4", "mxfp4", "fp8",
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "mxfp4_gguf",
    "iq2_xxs", "iq2_xs", "iq3_xxs", "iq1_s", "iq4_nl", "iq3_s",
    "iq2_s", "iq4_xs", "iq1_m", "tq1_0", "tq2_0",
    "packed",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockKind:
    """A GGUF type: ggml's number for it, the columns of a block, and the block's bytes."""

    type_number: int
    num_columns: int
    num_bytes: int


# Source: ggml's block structs, https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
BLOCK_KINDS: dict[QuantKind, BlockKind] = {
    "q4_0": BlockKind(2, 32, 18), "q4_1": BlockKind(3, 32, 20), "q5_0": BlockKind(6, 32, 22),
    "q5_1": BlockKind(7, 32, 24), "q8_0": BlockKind(8, 32, 34), "q2_k": BlockKind(10, 256, 84),
    "q3_k": BlockKind(11, 256, 110), "q4_k": BlockKind(12, 256, 144), "q5_k": BlockKind(13, 256, 176),
    "q6_k": BlockKind(14, 256, 210), "mxfp4_gguf": BlockKind(39, 32, 17),
    "iq2_xxs": BlockKind(16, 256, 66), "iq2_xs": BlockKind(17, 256, 74), "iq3_xxs": BlockKind(18, 256, 98),
    "iq1_s": BlockKind(19, 256, 50), "iq4_nl": BlockKind(20, 32, 18), "iq3_s": BlockKind(21, 256, 110),
    "iq2_s": BlockKind(22, 256, 82), "iq4_xs": BlockKind(23, 256, 136), "iq1_m": BlockKind(29, 256, 56),
    "tq1_0": BlockKind(34, 256, 54), "tq2_0": BlockKind(35, 256, 66),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantFormat:
    """Quantisation of one matrix. A scale is shared by `group` columns of `group_rows` rows.

    `offset` is what is added to stored integers (int4 8, int8 packed 128, I8 0); `scale_dtype` the safetensors name of
    the scales' type, "U8" for exponents of two (mxfp4).
    """

    kind: QuantKind
    group: int
    group_rows: int = 1
    symmetric: bool = True
    offset: int = 0
    scale_dtype: str = "BF16"

    @property
    def is_blocks(self) -> bool:
        """True for GGUF's: codes and scales lie together, block by block."""
        return self.kind in BLOCK_KINDS

    @property
    def is_lossless(self) -> bool:
        """True where the values are those of the plain matrix, bit for bit: it is computed as that one would be."""
        return self.kind == "packed"

    @property
    def name(self) -> str:
        """For people: `int4, groups of 32`."""
        if self.is_lossless:
            return "bfloat16, packed without loss"
        if self.kind == "mxfp4" or self.is_blocks:
            return self.kind.removesuffix("_gguf")
        if self.group_rows > 1:
            return f"{self.kind}, blocks of {self.group_rows} x {self.group}"
        return f"{self.kind}, groups of {self.group}" + ("" if self.symmetric else ", with zero points")
