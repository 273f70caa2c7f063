"""The Triton kernels against the reference, in Triton's interpreter. tests/gpu runs the same cases on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import slot_cases as cases
import torch
from benchlib.far_slots import make_far_slab, number_slots
from triton_interpreter import interpreted, outer, pass_under_the_interpreter

from offmoe.kernels.activations import Activation
from offmoe.kernels.geometry import Tiling
from offmoe.kernels.make_slot_kernels import make_slot_kernels
from offmoe.kernels.slot_kernels import SlotKernels, TorchSlotKernels

pytest.importorskip("triton", reason="triton has no wheel for this platform")


BY_NAME = {
    "silu": cases.silu_gate, "gelu": cases.gelu_gate, "gelu_tanh": cases.gelu_tanh_gate, "clamped": cases.clamped_gate,
    "late clamp": cases.late_clamp_gate, "early clamp": cases.early_clamp_gate, "unknown": cases.unknown_gate,
}  # fmt: skip
# Relative to the largest output. The interpreter cuts bfloat16 off where a device rounds.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.04, torch.float16: 0.003}


@outer
def test_under_the_interpreter() -> None:
    pass_under_the_interpreter(__file__)


def both(case: cases.SlotCase) -> tuple[SlotKernels, SlotKernels, torch.Tensor]:
    """Triton's and the reference's kernels over one slab, and Triton's count of the missing. Without the check at load,
    which takes the interpreter seconds."""
    missing_L = torch.zeros(1, dtype=torch.int32)
    model = ([case.layer], [case.math], case.slab, case.slot_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offmoe.kernels.triton.slots.failure_of", lambda *args: None)
        fast = make_slot_kernels(*model, slot_of_LE=case.slot_of_E[None], missing_L=missing_L, backend="triton")
    return fast, TorchSlotKernels(*model), missing_L


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCES[dtype] * scale)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_layout(layout: str, biases: bool, dtype: torch.dtype) -> None:
    case = cases.make_case(
        layout=layout, dtype=dtype, width_D=40, width_F=24, activate=cases.silu_gate, biases=biases, missing=(2,)
    )
    compare(case)


@interpreted
def test_a_device_without_tiles_leaves_several_rows_to_torch_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turing: one token goes by Triton's rows, five by torch's products."""
    monkeypatch.setattr("offmoe.kernels.triton.slots.tiling_of", lambda device: Tiling(has_tiles=False))
    monkeypatch.setattr(
        "offmoe.kernels.triton.launch.LayerKernels.tiles", MagicMock(side_effect=AssertionError("a tile"))
    )
    case = cases.make_case(layout="published", dtype=torch.float16, width_D=40, width_F=24, activate=cases.silu_gate)
    compare(case)
    fast, _, _ = both(case)
    assert "several rows of an expert are computed by torch" in fast.reasons[0]


def compare(case: cases.SlotCase, *, top_k: int = 3, with_slots: bool = True) -> None:
    """One token: rows, tokens and look-up, all row by row. Five tokens: tiles.

    `with_slots`: also tokens whose slots are given, which are computed as those whose slots are looked up.
    """
    fast, slow, missing_L = both(case)
    x_TD, ids_TK, weights_TK = case.rows(1, top_k)
    slot_TK = case.slot_of_E[ids_TK]
    rows = (0, x_TD, torch.zeros(top_k, dtype=torch.int32), slot_TK[0], ids_TK[0])
    assert_close(fast.rows_forward(*rows), slow.rows_forward(*rows), case.math.dtype)
    tokens = (0, x_TD, ids_TK, slot_TK, weights_TK)
    expected = slow.tokens_forward(*tokens)
    if with_slots:
        assert_close(fast.tokens_forward(*tokens), expected, case.math.dtype)
    assert_close(fast.lookup_forward(0, x_TD, ids_TK, weights_TK), expected, case.math.dtype)
    assert int(missing_L) == int((slot_TK < 0).sum())
    x_TD, ids_TK, _ = case.rows(5, 3)
    rows = (0, x_TD, torch.arange(15) // 3, case.slot_of_E[ids_TK].reshape(-1), ids_TK.reshape(-1))
    assert_close(fast.rows_forward(*rows), slow.rows_forward(*rows), case.math.dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_the_check_at_load_agrees_and_leaves_every_layer_to_triton(dtype: torch.dtype, gated: bool) -> None:
    case = cases.make_case(
        layout="published", dtype=dtype, width_D=40, width_F=24, gated=gated, biases=True, num_experts=2, top_k=2,
        activate=cases.silu_gate if gated else cases.relu_squared,
    )  # fmt: skip
    kernels = make_slot_kernels([case.layer] * 2, [case.math] * 2, case.slab, case.slot_bytes, backend="triton")
    assert kernels.reasons == {}


@interpreted
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slots_in_ram_have_numbers_too(dtype: torch.dtype, swapped: bool) -> None:
    """Experts 1 and 4 lie in one slab, the others a whole number of slots away; of the two either may be the lower."""
    case = cases.make_case(
        layout="published", dtype=dtype, width_D=40, width_F=24, activate=cases.silu_gate, biases=True, missing=(2,)
    )
    _, slow, _ = both(case)
    x_TD, ids_TK, weights_TK = case.rows(1, 6)
    slot_TK = case.slot_of_E[ids_TK]
    expected = slow.tokens_forward(0, x_TD, ids_TK, slot_TK, weights_TK)
    far = make_far_slab(case.slab, len(case.slab) // case.slot_bytes, case.slot_bytes)
    far.copy_(case.slab)
    is_near = (ids_TK == 1) | (ids_TK == 4)
    slabs = (far, case.slab) if swapped else (case.slab, far)
    slabs[1].view(-1, case.slot_bytes)[case.slot_of_E[[1, 4]]] = 0xFF  # NaN where nobody should read
    numbers = number_slots(*slabs, case.slot_bytes)
    first_TK = torch.where(is_near, numbers.first_near, numbers.first_far)
    numbered_TK = torch.where(slot_TK < 0, -1, slot_TK + first_TK).to(torch.int32)
    fast, _, _ = both(replace(case, slab=numbers.base))
    assert_close(fast.tokens_forward(0, x_TD, ids_TK, numbered_TK, weights_TK), expected, dtype)


@interpreted
@pytest.mark.parametrize("name", BY_NAME)
def test_every_activation(name: str) -> None:
    compare(
        cases.make_case(
            layout="transposed" if name == "clamped" else "published", dtype=torch.float32, width_D=40, width_F=24,
            activate=BY_NAME[name], biases=True, missing=(0, 5),
        )
    )  # fmt: skip


@interpreted
@pytest.mark.parametrize("activate", [cases.relu_squared, torch.nn.functional.gelu, torch.sin])
def test_experts_without_a_gate(activate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    compare(
        cases.make_case(
            layout="stacked", dtype=torch.float32, width_D=40, width_F=24, activate=activate, gated=False, missing=(1,)
        )
    )


@interpreted
@pytest.mark.parametrize(("width_D", "width_F"), [(16, 16), (7, 5), (130, 33), (70, 67)])
def test_widths_that_are_no_multiple_of_a_block(width_D: int, width_F: int) -> None:
    compare(
        cases.make_case(
            layout="transposed" if width_D == 130 else "published", dtype=torch.float16, width_D=width_D,
            width_F=width_F, activate=cases.silu_gate,
        )
    )  # fmt: skip


@interpreted
def test_many_rows_of_one_expert_fill_several_tiles() -> None:
    case = cases.make_case(
        layout="published", dtype=torch.float32, width_D=24, width_F=16, activate=cases.silu_gate, num_experts=3,
        missing=(1,),
    )  # fmt: skip
    fast, slow, _ = both(case)
    x_TD, _, _ = case.rows(150, 1)
    expert_N = torch.tensor([0] * 290 + [1] * 4 + [2] * 6)
    rows = (0, x_TD, torch.arange(300) // 2, case.slot_of_E[expert_N], expert_N)
    assert_close(fast.rows_forward(*rows), slow.rows_forward(*rows), torch.float32)


@interpreted
def test_ids_outside_the_layer_are_padding_and_not_missing() -> None:
    case = cases.make_case(
        layout="published", dtype=torch.float32, width_D=24, width_F=16, activate=cases.silu_gate, missing=(3,)
    )
    fast, slow, missing_L = both(case)
    for ids in ([[6, 3, 0]], [[6, 3, 0], [-1, 3, 3], [1, 2, 99], [0, 1, 2]]):
        ids_TK = torch.tensor(ids)
        slot_TK = torch.where((ids_TK >= 0) & (ids_TK < 6), case.slot_of_E[ids_TK.clamp(0, 5)], -1)
        x_TD, _, weights_TK = case.rows(len(ids), 3)
        missing_L.zero_()
        got = fast.lookup_forward(0, x_TD, ids_TK, weights_TK)
        assert_close(got, slow.tokens_forward(0, x_TD, ids_TK, slot_TK, weights_TK), torch.float32)
        assert int(missing_L) == sum(row.count(3) for row in ids)


@interpreted
def test_a_norm_after_the_experts_makes_nothing_of_missing_rows() -> None:
    case = cases.make_case(
        layout="published", dtype=torch.float32, width_D=24, width_F=16, activate=cases.silu_gate, missing=(3,)
    )
    with_norm = replace(case.math, post_norm=lambda y_ND: torch.nn.functional.layer_norm(y_ND, (24,)) + 1.0)
    compare(replace(case, math=with_norm))


@interpreted
def test_states_of_another_type_are_computed_in_the_layers_type() -> None:
    case = cases.make_case(
        layout="published", dtype=torch.bfloat16, width_D=24, width_F=16, activate=cases.silu_gate, top_k=3
    )
    fast, slow, _ = both(case)
    x_TD, ids_TK, weights_TK = case.rows(1, 3)
    tokens = (0, x_TD.float(), ids_TK, case.slot_of_E[ids_TK], weights_TK)
    got, expected = fast.tokens_forward(*tokens), slow.tokens_forward(*tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


@interpreted
def test_a_kernel_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from offmoe.kernels.triton import slots as triton_slots

    case = cases.make_case(
        layout="published", dtype=torch.float32, width_D=24, width_F=16, activate=cases.silu_gate
    )  # fmt: skip
    wrong = Activation(kind="gelu", gated=True)
    monkeypatch.setattr(triton_slots, "find_activation", lambda *args, **options: wrong)
    kernels = make_slot_kernels([case.layer], [case.math], case.slab, case.slot_bytes, backend="triton")
    assert "triton differs from torch by" in kernels.reasons[0]


@interpreted
@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_a_kernel_that_fails_is_not_used(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    from offmoe.kernels.triton import launch as triton_launch

    case = cases.make_case(
        layout="published", dtype=torch.float32, width_D=24, width_F=16, activate=cases.silu_gate
    )  # fmt: skip
    refuse = MagicMock(side_effect=kind("Failed to find C compiler. Please specify via CC.\nmore"))
    monkeypatch.setattr(triton_launch.LayerKernels, "tiles", refuse)
    kernels = make_slot_kernels([case.layer] * 3, [case.math] * 3, case.slab, case.slot_bytes, backend="triton")
    reason = "triton failed on tiles of 16 rows: Failed to find C compiler. Please specify via CC."
    assert kernels.reasons == {0: reason, 1: reason, 2: reason}
    assert refuse.call_count == 3 + 1, "layers that are alike are compiled and tried once"
    x_TD, ids_TK, weights_TK = case.rows(1, 2)
    tokens = (2, x_TD, ids_TK, case.slot_of_E[ids_TK], weights_TK)
    expected = TorchSlotKernels([case.layer] * 3, [case.math] * 3, case.slab, case.slot_bytes).tokens_forward(*tokens)
    assert torch.equal(kernels.tokens_forward(*tokens), expected)


@interpreted
def test_weights_stored_otherwise_are_left_to_torch() -> None:
    case = cases.make_case(
        layout="published", dtype=torch.float32, width_D=24, width_F=16, activate=cases.silu_gate
    )  # fmt: skip
    math = replace(case.math, dtype=torch.bfloat16)
    kernels = make_slot_kernels([case.layer], [math], case.slab, case.slot_bytes, backend="triton")
    assert kernels.reasons == {0: "weights are float32, computed in bfloat16"}


@interpreted
def test_layers_of_different_shapes_share_a_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (
        cases.make_case(
            layout="published", dtype=torch.float32, width_D=24, width_F=width_F, activate=cases.silu_gate
        )
        for width_F in (16, 48)
    )  # fmt: skip
    assert small.slot_bytes < large.slot_bytes
    layers, maths = [small.layer, large.layer, small.layer], [small.math, large.math, small.math]
    model = (layers, maths, large.slab, large.slot_bytes)
    monkeypatch.setattr("offmoe.kernels.triton.slots.failure_of", lambda *args: None)
    kernels = make_slot_kernels(*model, backend="triton")
    x_TD, ids_TK, weights_TK = small.rows(1, 2)
    for layer_idx in range(3):
        tokens = (layer_idx, x_TD, ids_TK, large.slot_of_E[ids_TK], weights_TK)
        expected = TorchSlotKernels(*model).tokens_forward(*tokens)
        assert_close(kernels.tokens_forward(*tokens), expected, torch.float32)
