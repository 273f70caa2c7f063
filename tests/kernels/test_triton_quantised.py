"""The Triton kernels on quantised experts, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import quant_cases
import slot_cases as cases
import test_triton_experts
import torch
from triton_interpreter import interpreted, outer, pass_under_the_interpreter

from offmoe.checkpoint.expert_index import MoeLayer, QuantPart
from offmoe.formats.dense import view_expert
from offmoe.formats.layout import layout_of
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.make_slot_kernels import make_slot_kernels
from offmoe.kernels.slot_kernels import TorchSlotKernels

pytest.importorskip("triton", reason="triton has no wheel for this platform")

SHAPES = {
    "fp8": (132, 20), "int8 zeros": (64, 128), "int4 channel": (40, 24), "int8 bytes": (36, 20),
    **dict.fromkeys(quant_cases.LARGE_BLOCKS, (256, 32)),
}  # fmt: skip
BLOCKS = (*quant_cases.SMALL_BLOCKS, *quant_cases.LARGE_BLOCKS)


@outer
def test_under_the_interpreter() -> None:
    pass_under_the_interpreter(__file__)


def compare(case: cases.SlotCase) -> None:
    """What reads weights: choosing and projecting rows, projecting and summing a token's, tiles."""
    test_triton_experts.compare(case, top_k=2, with_slots=False)


def make(name: str, **options: Any) -> cases.SlotCase:
    width_D, width_F = SHAPES.get(name, (96, 32))
    if name in quant_cases.LARGE_BLOCKS:
        options = {"down_name": "q8_0", **options}
    return quant_cases.make_quantised(name, **{"width_D": width_D, "width_F": width_F, "num_experts": 4, **options})


@interpreted
@pytest.mark.parametrize("name", [*quant_cases.FORMATS, *BLOCKS])
def test_values_are_those_of_the_format_to_the_bit(name: str) -> None:
    """One input is 1 and the others 0: what comes out is a column of the matrix, by rows and by tiles."""
    from offmoe.kernels.geometry import Tiling, make_tiles
    from offmoe.kernels.triton.launch import LayerKernels

    width_D = 256 if name in quant_cases.LARGE_BLOCKS else 64
    case = make(name, width_D=width_D, width_F=16, gated=False, num_experts=2, activate=lambda up: up)
    layout = layout_of(case.layer)
    kernels = LayerKernels(case.layer, layout, case.math, None, case.slab, case.slot_bytes, Tiling())
    slot = int(case.slot_of_E[1])
    (matrix,) = view_expert(case.layer, case.slab[slot * case.slot_bytes :], layout.offsets).up
    assert isinstance(matrix, QuantMatrix)
    expected = matrix.dequantise(torch.float32).t()
    assert len(expected.unique()) > 20, "codes of every kind"
    rows = torch.arange(width_D)
    slots = torch.full((width_D,), slot, dtype=torch.int32)
    x_TD = torch.eye(width_D)
    some = rows[:: 3 if width_D == 64 else 7].contiguous()  # at every place of a word and of 32 columns
    got = kernels.choose(x_TD, some, slots[: len(some)] * 0 + 1, slots[: len(some)])
    assert torch.equal(got, expected[some])
    tiles = make_tiles(slots, 64, 2)
    seen: list[torch.Tensor] = []
    kernels._math = replace(case.math, activate=lambda up: seen.append(up) or up)  # type: ignore[func-returns-value]
    kernels.tiles(x_TD, rows.int(), slots * 0 + 1, *tiles)
    assert torch.equal(seen[0], expected)


@interpreted
@pytest.mark.parametrize("name", [*quant_cases.FORMATS, *BLOCKS])
def test_every_format(name: str) -> None:
    compare(make(name, missing=(2,)))


@interpreted
@pytest.mark.parametrize("name", quant_cases.LARGE_BLOCKS)
def test_down_projections_of_large_blocks(name: str) -> None:
    compare(make("q8_0", width_D=32, width_F=256, down_name=name, missing=(2,)))


@interpreted
@pytest.mark.parametrize("name", ["int4", "fp8", "q4_0"])
def test_values_are_rounded_to_the_type_that_is_computed_in(name: str) -> None:
    """Not bfloat16: the interpreter cuts that off, and every weight is then too small."""
    compare(make(name, dtype=torch.float16, biases=True))


@interpreted
@pytest.mark.parametrize(
    ("name", "width_F"), [("int4 zeros", 32), ("fp8", 132), ("int8 bytes zeros", 16), ("q8_0", 32)]
)
def test_gate_and_up_in_one_matrix(name: str, width_F: int) -> None:
    """Its second half begins within a block of scales, or of zero points."""
    compare(make(name, stacked=True, width_D=32, width_F=width_F))


@interpreted
@pytest.mark.parametrize(("name", "biases"), [("mxfp4", False), ("mxfp4", True), ("mxfp4_gguf", True)])
def test_gate_and_up_take_turns(name: str, biases: bool) -> None:
    """gpt-oss: its module is transposed, its quantised matrices are not."""
    case = make(name, stacked=True, transposed=True, activate=cases.clamped_gate, biases=biases, missing=(0,))
    compare(case)


@interpreted
def test_an_activation_nobody_knows_and_experts_without_a_gate() -> None:
    compare(make("int4", activate=cases.unknown_gate))
    compare(make("mxfp4", gated=False, activate=cases.relu_squared))


@interpreted
@pytest.mark.parametrize("name", ["int8 zeros", "mxfp4", "fp8", "q4_0"])
def test_the_check_at_load_agrees(name: str) -> None:
    case = make(name, num_experts=2, top_k=2, dtype=torch.bfloat16, width_D=64, width_F=64)
    kernels = make_slot_kernels([case.layer] * 2, [case.math] * 2, case.slab, case.slot_bytes, backend="triton")
    assert kernels.reasons == {}


def changed(layer: MoeLayer, what: str, change: dict[str, Any]) -> MoeLayer:
    """The layer with another first part: `what` is its format, codes or scales."""
    part = layer.up[0]
    assert isinstance(part, QuantPart)
    return replace(layer, up=(replace(part, **{what: replace(getattr(part, what), **change)}), *layer.up[1:]))


@interpreted
@pytest.mark.parametrize(
    ("name", "what", "change", "reason"),
    [
        ("int4", "format", {"group": 48}, "groups of 48 columns are no multiple of 32"),
        ("int4", "codes", {"strides": (24, 2)}, "codes lie 2 apart"),
        ("int8 bytes", "codes", {"strides": (38, 1)}, "rows of codes do not begin at whole words"),
        ("fp8", "codes", {"offset": 3}, "rows of codes do not begin at whole words"),
        ("int4", "scales", {"dtype": "F64"}, "scales are stored as F64"),
        ("fp8", "codes", {"dtype": "U8"}, "fp8 codes are stored as U8"),
    ],
)
def test_what_the_kernels_cannot_read_is_left_to_torch(
    name: str, what: str, change: dict[str, Any], reason: str
) -> None:
    case = make(name)
    layer = changed(case.layer, what, change)
    kernels = make_slot_kernels([layer], [case.math], case.slab, case.slot_bytes, backend="triton")
    assert kernels.reasons == {0: reason}


@interpreted
def test_blocks_without_a_kernel_are_left_to_torch() -> None:
    case = make("q8_0")
    layer = changed(case.layer, "format", {"kind": "q4_1"})
    kernels = make_slot_kernels([layer], [case.math], case.slab, case.slot_bytes, backend="triton")
    assert kernels.reasons == {0: "q4_1 blocks have no kernel"}


@interpreted
def test_odd_widths_are_left_to_torch_and_computed() -> None:
    case = make("fp8", width_D=34, width_F=20)
    kernels = make_slot_kernels([case.layer], [case.math], case.slab, case.slot_bytes, backend="triton")
    assert kernels.reasons == {0: "34 columns are no multiple of 4"}
    x_TD, ids_TK, weights_TK = case.rows(1, 2)
    tokens = (0, x_TD, ids_TK, case.slot_of_E[ids_TK], weights_TK)
    expected = TorchSlotKernels([case.layer], [case.math], case.slab, case.slot_bytes).tokens_forward(*tokens)
    assert torch.equal(kernels.tokens_forward(*tokens), expected)
