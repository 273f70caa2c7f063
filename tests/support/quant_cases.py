"""Layers of quantised experts made by hand, in a slab; for the kernels' tests. `slot_cases` has the plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import slot_cases as cases
import torch

from offmoe.checkpoint.expert_index import ExpertPart, MoeLayer, QuantPart, Span
from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantFormat, QuantKind
from offmoe.formats.dense import STORED_DTYPES
from offmoe.kernels.random_weights import fill_at_random

CHANNEL = 0
FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"kind": "int4", "group": 32, "offset": 8},
    "int4 zeros": {"kind": "int4", "group": 32, "offset": 8, "symmetric": False, "scale_dtype": "F16"},
    "int4 channel": {"kind": "int4", "group": CHANNEL, "offset": 8, "scale_dtype": "F32"},
    "int8": {"kind": "int8", "group": 32, "offset": 128},
    "int8 zeros": {"kind": "int8", "group": 64, "offset": 128, "symmetric": False},
    "int8 bytes": {"kind": "int8", "group": CHANNEL},
    "int8 bytes zeros": {"kind": "int8", "group": 16, "symmetric": False},
    "mxfp4": {"kind": "mxfp4", "group": 32, "scale_dtype": "U8"},
    "fp8": {"kind": "fp8", "group": 128, "group_rows": 128, "scale_dtype": "F32"},
}
# GGUF's, of 32 columns and of 256.
SMALL_BLOCKS: tuple[QuantKind, ...] = ("q4_0", "q8_0", "mxfp4_gguf")
LARGE_BLOCKS: tuple[QuantKind, ...] = ("q4_k", "q5_k", "q6_k")


class Sources:
    """Collects sources: each part lies in one of its own."""

    def __init__(self) -> None:
        self.num_bytes: list[int] = []

    def plain(self, shape: tuple[int, int], dtype: str) -> ExpertPart:
        """A contiguous part, 16 elements from its source's start."""
        self.num_bytes.append((16 + shape[0] * shape[1]) * STORED_DTYPES[dtype].itemsize)
        return ExpertPart(
            source_idx=len(self.num_bytes) - 1, offset=16, shape=shape, strides=(shape[1], 1), dtype=dtype
        )

    def quantised(self, name: str, shape: tuple[int, int]) -> QuantPart:
        """A matrix of (outputs, inputs) in a format of FORMATS or of GGUF's blocks."""
        num_out, num_in = shape
        if name in SMALL_BLOCKS or name in LARGE_BLOCKS:
            kind = cast(QuantKind, name)
            block = BLOCK_KINDS[kind]
            format_ = QuantFormat(kind=kind, group=block.num_columns, scale_dtype="U8")
            codes = self.plain((num_out, num_in // block.num_columns * block.num_bytes), "U8")
            return QuantPart(format=format_, shape=shape, codes=codes, scales=None)
        settings = FORMATS[name]
        format_ = QuantFormat(**{**settings, "group": settings["group"] or num_in})
        is_bytes = "bytes" in name
        code_type, a_code = {
            "int4": ("I32", 8), "int8": ("I8", 1) if is_bytes else ("I32", 4), "mxfp4": ("U8", 2),
            "fp8": ("F8_E4M3", 1),
        }[format_.kind]  # fmt: skip
        groups = -(-num_in // format_.group)
        zeros = None
        if not format_.symmetric:
            a_zero = 1 if is_bytes else a_code
            zeros = self.plain((-(-num_out // a_zero), groups), "I8" if is_bytes else "I32")
        return QuantPart(
            format=format_, shape=shape, zeros=zeros, codes=self.plain((num_out, num_in // a_code), code_type),
            scales=self.plain((-(-num_out // format_.group_rows), groups), format_.scale_dtype),
        )  # fmt: skip


def make_quantised(
    name: str, *, width_D: int, width_F: int, dtype: torch.dtype = torch.float32, stacked: bool = False,
    activate: Callable[[torch.Tensor], torch.Tensor] = cases.silu_gate, biases: bool = False, num_experts: int = 6,
    top_k: int = 2, missing: tuple[int, ...] = (), transposed: bool = False, device: str = "cpu", gated: bool = True,
    down_name: str | None = None,
) -> cases.SlotCase:  # fmt: skip
    """Random experts in a format of FORMATS or of GGUF's blocks.

    `stacked`: gate and up are one part. `transposed` is for gpt-oss. `down_name`: the down projection's format where it
    is another.
    """
    sources = Sources()
    rows_up = [2 * width_F] if stacked else [width_F, width_F]
    up = tuple(sources.quantised(name, (rows, width_D)) for rows in (rows_up if gated else [width_F]))
    down = (sources.quantised(down_name or name, (width_D, width_F)),)
    spans = tuple(Span(file_idx=0, start=0, num_bytes=size) for size in sources.num_bytes)
    layer = MoeLayer(
        name=name, num_experts=num_experts, top_k=top_k, up=up, down=down, transposed=transposed,
        spans=(spans,) * num_experts,
    )  # fmt: skip
    width_up = 2 * width_F if gated else width_F
    return cases.fill_slab(
        layer, lambda part, generator: fill_at_random(part, part.shape[1], generator),
        (width_up, width_D) if biases else None, activate=activate, dtype=dtype, missing=missing, device=device,
    )  # fmt: skip
