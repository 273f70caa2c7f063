"""Layers of experts for benchmarks: sizes of published models, in every format; where their bytes would lie."""

from __future__ import annotations

from dataclasses import dataclass

from offmoe.checkpoint.expert_index import ExpertPart, MoeLayer, QuantPart, Span
from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantFormat
from offmoe.formats.dense import STORED_DTYPES


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's MoE layer: D model width, F expert width."""

    name: str
    width_D: int
    width_F: int
    num_experts: int
    top_k: int


SHAPES = (
    Shape(name="Qwen3-30B-A3B", width_D=2048, width_F=768, num_experts=128, top_k=8),
    Shape(name="Mixtral-8x7B", width_D=4096, width_F=14336, num_experts=8, top_k=2),
)
BF16 = "bf16"
FORMATS: dict[str, QuantFormat | None] = {
    BF16: None,
    "int8": QuantFormat(kind="int8", group=32, offset=128),
    "int4": QuantFormat(kind="int4", group=32, offset=8),
    "mxfp4": QuantFormat(kind="mxfp4", group=32, scale_dtype="U8"),
    "fp8": QuantFormat(kind="fp8", group=128, group_rows=128, scale_dtype="F32"),
    "q8_0": QuantFormat(kind="q8_0", group=32, scale_dtype="U8"),
    "q6_k": QuantFormat(kind="q6_k", group=256, scale_dtype="U8"),
    "q4_k": QuantFormat(kind="q4_k", group=256, scale_dtype="U8"),
}
# How codes are stored, and how many columns one holds.
CODES = {"int8": ("I32", 4), "int4": ("I32", 8), "mxfp4": ("U8", 2), "fp8": ("F8_E4M3", 1)}
TINY = (Shape(name="tiny", width_D=64, width_F=32, num_experts=6, top_k=2),)


def fits(shape: Shape, format_: QuantFormat | None) -> bool:
    """Whether rows of both widths are whole blocks, where the format has blocks."""
    return format_ is None or not format_.is_blocks or not (shape.width_D | shape.width_F) % format_.group


def make_layer(shape: Shape, format_: QuantFormat | None) -> MoeLayer:
    """A source for every tensor, as published."""
    up, num_bytes, parts = (shape.width_F, shape.width_D), list[int](), list[ExpertPart | QuantPart]()

    def part(size: tuple[int, int], dtype: str) -> ExpertPart:
        num_bytes.append(size[0] * size[1] * STORED_DTYPES[dtype].itemsize)
        return ExpertPart(source_idx=len(num_bytes) - 1, offset=0, shape=size, strides=(size[1], 1), dtype=dtype)

    for size in (up, up, up[::-1]):
        if format_ is None:
            parts.append(part(size, "BF16"))
            continue
        num_out, num_in = size
        if format_.is_blocks:
            block = BLOCK_KINDS[format_.kind]
            codes = part((num_out, num_in // block.num_columns * block.num_bytes), "U8")
            parts.append(QuantPart(format=format_, shape=size, codes=codes, scales=None))
            continue
        code_dtype, columns = CODES[format_.kind]
        scales = (-(-num_out // format_.group_rows), -(-num_in // format_.group))
        codes = part((num_out, num_in // columns), code_dtype)
        parts.append(QuantPart(format=format_, shape=size, codes=codes, scales=part(scales, format_.scale_dtype)))
    spans = tuple(Span(file_idx=0, start=0, num_bytes=size) for size in num_bytes)
    return MoeLayer(
        name=shape.name, num_experts=shape.num_experts, top_k=shape.top_k, up=tuple(parts[:2]), down=tuple(parts[2:]),
        transposed=False, spans=(spans,) * shape.num_experts,
    )  # fmt: skip
