"""The CPU kernels with activations rounded to 8 bits, at every level, against the reference of that rounding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from cpu_cases import LEVELS, linear, needs_library, open_kernels
from slot_cases import silu_gate
from test_cpu_kernels_quantised import MATRICES, TOLERANCES, int4, int8, mxfp4

from offmoe.formats.dense import ExpertWeights
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu import CpuKernels
from offmoe.kernels.int8_activations import GROUP, LARGEST_CODE, SMALLEST, round_activations, rounds
from offmoe.kernels.reference import ExpertMath

pytestmark = needs_library

INTEGERS = {name: matrix for name, matrix in MATRICES.items() if rounds(matrix.format)}
ROWS = (1, 2, 3, 4, 5, 8, 11, 16, 35)


@pytest.fixture(scope="module", params=LEVELS or ["none"])
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    opened = open_kernels(request.param)
    opened.rounds_activations = True
    yield opened
    opened.close()


def test_the_reference_rounds_to_the_nearest_of_255_steps() -> None:
    x_TK = torch.randn(3, 80) * torch.tensor([[1e-20], [1.0], [1e20]])
    rounded = round_activations(x_TK)
    for begin in range(0, 80, GROUP):
        group, got = x_TK[:, begin : begin + GROUP], rounded[:, begin : begin + GROUP]
        step = group.abs().amax(1, keepdim=True).double() / LARGEST_CODE
        assert ((group.double() - got).abs() <= 0.5001 * step).all()
        assert torch.allclose(got / step, (got / step).round(), atol=1e-4)
        largest = group.abs().argmax(1, keepdim=True)  # others may be rounded to the same step
        assert torch.equal(got.abs().gather(1, largest), got.abs().amax(1, keepdim=True))


def test_groups_of_zeros_and_of_what_is_no_number() -> None:
    x_TK = torch.full((1, 5 * GROUP), float(LARGEST_CODE))
    x_TK[0, :GROUP] = 0.0
    x_TK[0, GROUP : 2 * GROUP] = SMALLEST / 2
    x_TK[0, 2 * GROUP], x_TK[0, 3 * GROUP + 5] = torch.inf, torch.nan
    rounded = round_activations(x_TK)[0]
    assert (rounded[: 2 * GROUP] == 0).all() and (rounded[4 * GROUP :] == LARGEST_CODE).all()
    assert rounded[2 * GROUP : 4 * GROUP].isnan().all()


@pytest.mark.parametrize("name", INTEGERS)
def test_products_are_those_of_rounded_activations(kernels: CpuKernels, name: str) -> None:
    matrix = INTEGERS[name]
    exact_KN = matrix.dequantise(torch.float64).t()
    for dtype, num_rows in itertools.product(TOLERANCES, ROWS):
        x_TK = torch.randn(num_rows, matrix.shape[1]).to(dtype)
        rounded_TK = round_activations(x_TK)
        got_TN, expected_TN = linear(kernels, x_TK, matrix), rounded_TK @ exact_KN
        limit_TN = TOLERANCES[dtype] * (rounded_TK.abs() @ exact_KN.abs()) + 1e-7
        wrong_TN = (got_TN.double() - expected_TN).abs() > limit_TN
        assert not wrong_TN.any(), f"{dtype=} {num_rows=}: {got_TN[wrong_TN][:3]} is not {expected_TN[wrong_TN][:3]}"


@pytest.mark.parametrize("name", INTEGERS)
def test_a_row_depends_on_itself_alone(kernels: CpuKernels, name: str) -> None:
    matrix = INTEGERS[name]
    x_TK = torch.randn(35, INTEGERS[name].shape[1])
    alone = torch.cat([linear(kernels, row[None], matrix) for row in x_TK])
    for num_rows in (2, 3, 4, 5, 8, 15, 35):
        assert torch.equal(linear(kernels, x_TK[:num_rows], matrix), alone[:num_rows]), f"{num_rows=}"


@pytest.mark.parametrize("matrix", [int4((21, 160), 32, symmetric=True, scale_dtype="F32"), mxfp4((21, 160))])
def test_extreme_rows(kernels: CpuKernels, matrix: QuantMatrix) -> None:
    """Zeros, numbers too small to divide by, the largest there are, and no numbers: only their own row is spoilt."""
    x_TK = torch.randn(6, 160)
    x_TK[0], x_TK[1], x_TK[2] = 0.0, SMALLEST / 3, torch.finfo(torch.float32).max / 1e6
    x_TK[3, 7], x_TK[4, 150] = torch.nan, -torch.inf
    got_TN = linear(kernels, x_TK, matrix)
    assert (got_TN[:2] == 0).all() and got_TN[3:5].isnan().all()
    expected_TN = round_activations(x_TK) @ matrix.dequantise(torch.float64).t()
    for row in (2, 5):
        limit = 1e-5 * expected_TN[row].abs().max()
        assert ((got_TN[row].double() - expected_TN[row]).abs() <= limit).all()


@pytest.mark.parametrize("kind", ["int4", "int8", "mxfp4"])
def test_experts(kernels: CpuKernels, kind: str) -> None:
    """Both products of an expert are of rounded activations, and all three matrices of them of the same row."""
    torch.manual_seed(5)
    width, hidden = 192, 64

    def make(shape: tuple[int, int]) -> QuantMatrix:
        if kind == "int4":
            return int4(shape, 32, symmetric=False, scale_dtype="BF16")
        return mxfp4(shape) if kind == "mxfp4" else int8(shape, 64, packed=True, symmetric=True, scale_dtype="BF16")

    math = ExpertMath(
        activate=silu_gate, up_bias_EF=None, down_bias_ED=None, post_norm=None, transposed=kind == "mxfp4",
        dtype=torch.float32,
    )  # fmt: skip
    gate, up, down = make((hidden, width)), make((hidden, width)), make((width, hidden))
    weights = ExpertWeights((gate, up), (down,))
    layer, x_TD, y_TD = kernels.layer(math, weights), torch.randn(7, width), torch.zeros(7, width)
    kernels.experts(layer, [(0, weights, range(7), range(7))], x_TD, y_TD)
    rounded_TD = round_activations(x_TD)
    gate_TF, up_TF = (rounded_TD @ matrix.dequantise(torch.float64).t() for matrix in (gate, up))
    hidden_TF = silu_gate(torch.cat((gate_TF, up_TF), 1).float())
    expected_TD = round_activations(hidden_TF) @ down.dequantise(torch.float64).t()
    # A hidden number that lies between two steps may be rounded to the other one: rarely, and by one step.
    error_TD, largest = (y_TD.double() - expected_TD).abs(), float(expected_TD.abs().max())
    assert error_TD.max() <= 1e-2 * largest and error_TD.mean() <= 1e-4 * largest


def test_rounding_ends_when_it_is_switched_off(kernels: CpuKernels) -> None:
    matrix, x_TK = INTEGERS["int4-384-128-True-BF16"], torch.randn(5, 384)
    exact_TN = x_TK.double() @ matrix.dequantise(torch.float64).t()
    assert str(kernels).endswith(", int8 activations")
    rounded = linear(kernels, x_TK, matrix)
    kernels.rounds_activations = False
    try:
        assert "int8" not in str(kernels)
        torch.testing.assert_close(linear(kernels, x_TK, matrix).double(), exact_TN, rtol=1e-5, atol=1e-4)
    finally:
        kernels.rounds_activations = True
    assert torch.equal(linear(kernels, x_TK, matrix), rounded)
    assert (rounded.double() - exact_TN).abs().max() > 1e-3


def test_other_weights_are_multiplied_as_ever(kernels: CpuKernels) -> None:
    exact = open_kernels(kernels.level)
    for name in ("fp8-640-128", "fp8-33-128"):
        x_TK = torch.randn(6, MATRICES[name].shape[1]).bfloat16()
        matrix = MATRICES[name]
        assert torch.equal(linear(kernels, x_TK, matrix), linear(exact, x_TK, matrix))
    plain = torch.randn(24, 96).bfloat16()
    x_TK = torch.randn(6, 96).bfloat16()
    assert torch.equal(linear(kernels, x_TK, plain), linear(exact, x_TK, plain))
    exact.close()
