"""The library of CPU kernels on quantised matrices as published: against their values in float64, and the reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import gguf
import pytest
import torch
from cpu_cases import LEVELS, linear, needs_library, open_kernels
from slot_cases import silu_gate

from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantFormat, QuantKind
from offmoe.formats.dense import ExpertWeights
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu import CpuKernels, unreadable
from offmoe.kernels.random_weights import fill_at_random
from offmoe.kernels.reference import ExpertMath, experts_forward

pytestmark = needs_library

SCALES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# How many bits of the sum of absolute products may be lost.
TOLERANCES = {torch.float32: 2**-21, torch.float16: 2**-11, torch.bfloat16: 2**-8}
ODD = 3
PAIRS: tuple[QuantKind, ...] = ("q4_0", "q8_0", "mxfp4_gguf", "iq4_nl")  # of 32 columns
LARGE: tuple[QuantKind, ...] = ("q4_k", "q5_k", "q6_k", "iq4_xs")  # of 256


def int4(shape: tuple[int, int], group: int, *, symmetric: bool, scale_dtype: str) -> QuantMatrix:
    rows, columns = shape
    form = QuantFormat(kind="int4", group=group, offset=8, symmetric=symmetric, scale_dtype=scale_dtype)
    zeros = None if symmetric else words(-(-rows // 8), columns // group)
    return QuantMatrix(form, shape, words(rows, columns // 8), scales(rows, columns // group, scale_dtype), zeros)


def int8(shape: tuple[int, int], group: int, *, packed: bool, symmetric: bool, scale_dtype: str) -> QuantMatrix:
    rows, columns = shape
    form = QuantFormat(
        kind="int8", group=group, offset=128 if packed else 0, symmetric=symmetric, scale_dtype=scale_dtype
    )
    codes = words(rows, columns // 4) if packed else small(torch.int8, rows, columns)
    zeros = None
    if not symmetric:
        zeros = words(-(-rows // 4), columns // group) if packed else small(torch.int8, rows, columns // group)
    return QuantMatrix(form, shape, codes, scales(rows, columns // group, scale_dtype), zeros)


def mxfp4(shape: tuple[int, int]) -> QuantMatrix:
    rows, columns = shape
    exponents = torch.randint(120, 128, (rows, columns // 32 + ODD), dtype=torch.uint8)[:, : columns // 32]
    form = QuantFormat(kind="mxfp4", group=32, scale_dtype="U8")
    return QuantMatrix(form, shape, small(torch.uint8, rows, columns // 2), exponents, None)


def fp8(shape: tuple[int, int], group: int) -> QuantMatrix:
    rows, columns = shape
    codes = small(torch.uint8, rows, columns)
    codes[(codes & 127) == 127] = 1  # NaN otherwise; 1 is the smallest number above zero
    form = QuantFormat(kind="fp8", group=group, group_rows=group, scale_dtype="F32")
    matrix_scales = scales(-(-rows // group), -(-columns // group), "F32")
    return QuantMatrix(form, shape, codes.view(torch.float8_e4m3fn), matrix_scales, None)


def blocks(kind: QuantKind, shape: tuple[int, int]) -> QuantMatrix:
    (rows, columns), block = shape, BLOCK_KINDS[kind]
    codes = small(torch.uint8, rows, columns // block.num_columns * block.num_bytes)
    form = QuantFormat(kind=kind, group=block.num_columns, scale_dtype="U8")
    matrix = QuantMatrix(form, shape, codes, None, None)
    fill_at_random(matrix, columns, torch.Generator().manual_seed(columns))
    return matrix


def words(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (rows, columns + ODD), dtype=torch.int32)[:, :columns]


def small(dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, columns + ODD), dtype=torch.uint8).view(dtype)[:, :columns]


def scales(rows: int, columns: int, dtype: str) -> torch.Tensor:
    return ((torch.rand(rows, columns + ODD) + 0.5) * 0.02).to(SCALES[dtype])[:, :columns]


def matrices() -> Iterator[tuple[str, QuantMatrix]]:
    torch.manual_seed(11)
    for columns, group in ((32, 32), (288, 32), (576, 64), (384, 128), (672, 96), (296, 296), (512, 256)):
        for symmetric, scale_dtype in itertools.product((True, False), SCALES):
            yield (
                f"int4-{columns}-{group}-{symmetric}-{scale_dtype}",
                int4((21, columns), group, symmetric=symmetric, scale_dtype=scale_dtype),
            )
            for packed in (True, False):
                yield (
                    f"int8-{columns}-{group}-{packed}-{symmetric}-{scale_dtype}",
                    int8((21, columns), group, packed=packed, symmetric=symmetric, scale_dtype=scale_dtype),
                )
    yield "int8-channel-77", int8((21, 77), 77, packed=False, symmetric=True, scale_dtype="BF16")
    for columns in (32, 96, 544):
        yield f"mxfp4-{columns}", mxfp4((21, columns))
    for columns, group in ((128, 128), (200, 128), (640, 128), (96, 32), (33, 128)):
        yield f"fp8-{columns}-{group}", fp8((37, columns), group)
    for kind in PAIRS:
        for columns in (32, 64, 96, 352, 1440):
            yield f"{kind}-{columns}", blocks(kind, (37, columns))
    for kind in LARGE:
        for columns in (256, 768, 1792):
            yield f"{kind}-{columns}", blocks(kind, (37, columns))


MATRICES = dict(matrices())


@pytest.fixture(scope="module", params=LEVELS or ["none"])
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    opened = open_kernels(request.param)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", MATRICES)
def test_products_are_those_of_the_published_values(kernels: CpuKernels, name: str) -> None:
    matrix = MATRICES[name]
    exact = matrix.dequantise(torch.float64)
    for dtype, num_rows in itertools.product(TOLERANCES, (1, 2, 3, 5, 8, 11, 16)):
        assert unreadable(matrix, dtype) is None
        x_TK = torch.randn(num_rows, matrix.shape[1]).to(dtype)
        got = linear(kernels, x_TK, matrix)
        expected = x_TK.double() @ exact.t()
        limit = TOLERANCES[dtype] * (x_TK.double().abs() @ exact.abs().t()) + 1e-7
        wrong = (got.double() - expected).abs() > limit
        assert not wrong.any(), f"{dtype=} {num_rows=}: {got[wrong][:3]} is not {expected[wrong][:3]}"


@pytest.mark.parametrize("name", MATRICES)
def test_a_row_depends_on_itself_alone(kernels: CpuKernels, name: str) -> None:
    matrix = MATRICES[name]
    for dtype in TOLERANCES:
        x_TK = torch.randn(17, MATRICES[name].shape[1]).to(dtype)
        alone = torch.cat([linear(kernels, row[None], matrix) for row in x_TK])
        for num_rows in range(2, 18):
            assert torch.equal(linear(kernels, x_TK[:num_rows], matrix), alone[:num_rows]), f"{dtype=} {num_rows=}"


def test_the_smallest_and_largest_codes_of_fp8(kernels: CpuKernels) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    codes[(codes & 127) == 127] = 0
    matrix = QuantMatrix(
        QuantFormat(kind="fp8", group=128, group_rows=128, scale_dtype="F32"), (256, 256),
        codes.view(torch.float8_e4m3fn), torch.ones(2, 2), None,
    )  # fmt: skip
    for dtype in TOLERANCES:
        got = linear(kernels, torch.eye(256).to(dtype), matrix)
        assert torch.equal(got[:, 0], codes[0].view(torch.float8_e4m3fn).to(dtype))


def test_the_smallest_scale_of_mxfp4(kernels: CpuKernels) -> None:
    codes, exponents = (
        torch.full((40, 16), 0x77, dtype=torch.uint8),
        torch.tensor([[0], [1], [127], [200]], dtype=torch.uint8).repeat(10, 1),
    )
    matrix = QuantMatrix(QuantFormat(kind="mxfp4", group=32, scale_dtype="U8"), (40, 32), codes, exponents, None)
    x_TK = torch.full((1, 32), 2.0**40)
    expected = (6.0 * 32 * 2.0**40 * torch.exp2(exponents.double() - 127)).t()
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(linear(kernels, x_TK.to(dtype), matrix).double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("kind", ["q4_k", "q6_k", "q8_0", "iq4_nl", "iq4_xs"])
def test_each_column_of_a_block_has_its_own_place(kernels: CpuKernels, kind: QuantKind) -> None:
    matrix = blocks(kind, (37, 512))
    for dtype, tolerance in TOLERANCES.items():
        got = linear(kernels, torch.eye(512).to(dtype), matrix).double()
        values = matrix.dequantise(torch.float64).t()
        torch.testing.assert_close(got, values, rtol=tolerance, atol=2**-20)


def test_every_code_and_scale_of_iq4_is_the_gguf_packages(kernels: CpuKernels) -> None:
    """A row for each scale of six bits, the same in all eight groups; a column for each code."""
    codes = torch.zeros(64, 136, dtype=torch.uint8)
    codes[:, 0:2] = torch.tensor([0.125], dtype=torch.float16).view(torch.uint8)
    scales = torch.arange(64, dtype=torch.int64)
    codes[:, 2:4] = (scales >> 4)[:, None] * 0b01010101
    codes[:, 4:8] = (scales & 15)[:, None] * 0x11
    codes[:, 8:] = torch.arange(16, dtype=torch.uint8).repeat(8) * 0x11
    small = torch.cat((codes[:, 0:2], codes[:, 8:24]), 1)
    for kind, stored in (("iq4_xs", codes), ("iq4_nl", small)):
        block = BLOCK_KINDS[kind]
        matrix = QuantMatrix(
            QuantFormat(kind=kind, group=block.num_columns, scale_dtype="U8"),
            (64, block.num_columns),
            stored,
            None,
            None,
        )
        number = gguf.GGMLQuantizationType(block.type_number)
        expected = torch.from_numpy(gguf.dequantize(stored.numpy(), number))
        assert expected.unique().numel() > 16 if kind == "iq4_xs" else expected.unique().numel() == 16
        for dtype in TOLERANCES:
            got = linear(kernels, torch.eye(block.num_columns).to(dtype), matrix)
            assert torch.equal(got, expected.t().to(dtype)), f"{kind=} {dtype=}"


def test_every_exponent_of_gguf_mxfp4_but_the_infinite_one(kernels: CpuKernels) -> None:
    codes = torch.full((255, 17), 0x31, dtype=torch.uint8)  # 0.5 and 1.5
    codes[:, 0] = torch.arange(255, dtype=torch.int32).to(torch.uint8)
    matrix = QuantMatrix(QuantFormat(kind="mxfp4_gguf", group=32, scale_dtype="U8"), (255, 32), codes, None, None)
    for dtype in (torch.float32, torch.bfloat16):
        for column, code in ((0, 0.5), (16, 1.5)):
            x_TK = torch.zeros(1, 32, dtype=dtype)
            x_TK[0, column] = 2.0**10
            expected = (code * 2.0**10 * torch.exp2(torch.arange(255.0, dtype=torch.float64) - 127))[None].to(dtype)
            assert torch.equal(linear(kernels, x_TK, matrix), expected)


@pytest.mark.parametrize("kind", ["int4", "int8", "mxfp4", "fp8", *PAIRS, *LARGE])
@pytest.mark.parametrize("split", [True, False])
def test_experts_agree_with_the_reference(kernels: CpuKernels, kind: QuantKind, split: bool) -> None:
    torch.manual_seed(5)

    def make(shape: tuple[int, int]) -> QuantMatrix:
        if kind in BLOCK_KINDS:
            return blocks(kind, shape)
        if kind == "int4":
            return int4(shape, 32, symmetric=False, scale_dtype="BF16")
        if kind == "int8":
            return int8(shape, 64, packed=True, symmetric=True, scale_dtype="BF16")
        return mxfp4(shape) if kind == "mxfp4" else fp8(shape, 128)

    width, hidden = (512, 256) if kind in LARGE else (192, 64)
    math = ExpertMath(
        activate=silu_gate, up_bias_EF=torch.randn(4, 2 * hidden), down_bias_ED=torch.randn(4, width), post_norm=None,
        transposed=kind == "mxfp4", dtype=torch.float32,
    )  # fmt: skip
    weights = [
        ExpertWeights(
            (make((hidden, width)), make((hidden, width))) if split else (make((2 * hidden, width)),),
            (make((width, hidden)),),
        )
        for _ in range(4)
    ]
    assert kernels.supports(math, weights[0]) is None
    layer, x_TD, y_SD = kernels.layer(math, weights[0]), torch.randn(6, width), torch.zeros(6, width)
    rows = [(2, weights[2], [0, 3, 5], [1, 0, 2]), (0, weights[0], [1], [3]), (3, weights[3], [2, 4], [5, 4])]
    kernels.experts(layer, rows, x_TD, y_SD)
    for expert_idx, expert, tokens, choices in rows:
        expected = experts_forward(math, [(expert_idx, expert, x_TD[tokens])])
        torch.testing.assert_close(y_SD[choices], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_groups_of_a_strange_size_are_refused() -> None:
    matrix = int4((8, 96), 24, symmetric=True, scale_dtype="BF16")
    assert unreadable(matrix, torch.bfloat16) == "groups of 24 columns are no multiple of 32"
