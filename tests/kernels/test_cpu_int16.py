"""Activations that the AVX2 kernels round to 16-bit integers: the stated bound, and rows that have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cpu_cases import LEVELS, linear, needs_library, open_kernels
from test_cpu_kernels_quantised import MATRICES

from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu import CpuKernels

pytestmark = needs_library

DTYPES = (torch.bfloat16, torch.float16)
GROUP = 32
# The rounding of an activation, as a part of the largest in its group. Sums in float32 and this test's own arithmetic
# come on top.
ROUNDING, SUMS = 2**-15, 2**-17
NAMES = (
    "int4-288-32-True-BF16", "int4-672-96-False-F16", "int4-296-296-True-F32", "int8-384-128-True-False-BF16",
    "int8-576-64-False-True-F16", "int8-channel-77", "mxfp4-544", "q4_0-1440", "q8_0-352", "mxfp4_gguf-352",
    "iq4_nl-352", "q4_k-768", "q5_k-768", "q6_k-1792", "iq4_xs-768",
)  # fmt: skip


@pytest.fixture(scope="module", params=[level for level in LEVELS if level != "avx512"] or ["none"])
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    opened = open_kernels(request.param)
    yield opened
    opened.close()


def one_huge(x_GC: torch.Tensor) -> torch.Tensor:
    """One number in each group that all others are far below."""
    x_GC[:, 5] = 300.0
    return x_GC


def all_equal(x_GC: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x_GC, 1.9921875)  # all ones: 255 / 128


def alternating(x_GC: torch.Tensor) -> torch.Tensor:
    return x_GC.abs().add(1e-3) * torch.tensor([1.0, -1.0]).repeat(GROUP // 2)


def half_a_unit(x_GC: torch.Tensor) -> torch.Tensor:
    """The largest error there is, all of one sign: numbers halfway between two integers beside a power of two."""
    x_GC[:] = 1.5 * 2.0**-14
    x_GC[:, 0] = 1.0
    return x_GC


def zeros_and_small(x_GC: torch.Tensor) -> torch.Tensor:
    """Groups of zeros, of one number, and of far apart sizes side by side."""
    x_GC[::3] = 0.0
    x_GC[1::3, 1:] = 0.0
    return x_GC * torch.exp2(torch.arange(len(x_GC)) % 13 - 6.0)[:, None]


SHAPES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    torch.Tensor.clone, one_huge, all_equal, alternating, half_a_unit, zeros_and_small,
)  # fmt: skip


def activations(num_columns: int, dtype: torch.dtype, shape: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """One row."""
    num_groups = -(-num_columns // GROUP)
    return shape(torch.randn(num_groups, GROUP)).reshape(1, -1)[:, :num_columns].to(dtype)


def group_sums(x_1K: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """The largest sum that a row of weights could come to with activations no larger than each group's largest one."""
    largest = torch.cat([part.abs().amax().expand(part.shape[1]) for part in x_1K.double().split(GROUP, dim=1)])
    return weight_NK.abs() @ largest


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_within_the_stated_bound(
    kernels: CpuKernels, name: str, shape: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """A bias is added before the rounding to 16 bits: minus the expected number as near as 16 bits have it leaves the
    error with many bits."""
    matrix = MATRICES[name]
    weight = matrix.dequantise(torch.float64)
    for dtype in DTYPES:
        x_1K = activations(matrix.shape[1], dtype, shape)
        expected = (x_1K.double() @ weight.t())[0]
        nearest = expected.to(dtype)
        error = linear(kernels, x_1K, matrix, -nearest)[0].double() - (expected - nearest.double())
        limit = (ROUNDING + SUMS) * group_sums(x_1K, weight) + 1e-7
        assert bool((error.abs() <= limit).all()), f"{dtype=} {float((error.abs() / limit).max())=}"


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_similar_size_lose_nothing(kernels: CpuKernels, name: str) -> None:
    """Bfloat16 numbers of at least 2^-7 of their group's largest one are whole units; float16 ones of 2^-4."""
    matrix = MATRICES[name]
    weight = matrix.dequantise(torch.float64)
    for dtype, smallest in ((torch.bfloat16, 2**-6), (torch.float16, 2**-3)):
        x_1K = (torch.rand(1, matrix.shape[1]) * (1 - smallest) + smallest).to(dtype)
        x_1K *= torch.randint(0, 2, x_1K.shape) * 2 - 1
        expected = (x_1K.double() @ weight.t())[0]
        nearest = expected.to(dtype)
        error = linear(kernels, x_1K, matrix, -nearest)[0].double() - (expected - nearest.double())
        limit = SUMS * (x_1K.double().abs() @ weight.abs().t())[0] + 1e-7
        assert bool((error.abs() <= limit).all()), f"{dtype=} {float((error.abs() / limit).max())=}"


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 2.0**70, 2.0**-70, 2.0**-130])
@pytest.mark.parametrize("name", NAMES)
def test_rows_without_a_unit_are_multiplied_in_floats(kernels: CpuKernels, name: str, value: float) -> None:
    """Infinities, NaN, and groups of very large or very small numbers: as in float32, to the bit, in any company."""
    matrix = MATRICES[name]
    x_TK = torch.randn(6, matrix.shape[1]).bfloat16()
    odd = [1, 2, 5]
    if abs(value) < 1:
        x_TK[odd, :GROUP] = value
    else:
        x_TK[odd, 7] = value
    got = linear(kernels, x_TK, matrix)
    in_floats = linear(kernels, x_TK.float(), matrix).bfloat16()
    assert_same(got[odd], in_floats[odd])
    for row in range(6):
        assert_same(linear(kernels, x_TK[row : row + 1], matrix)[0], got[row])


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def test_a_scale_of_zero_makes_zeros(kernels: CpuKernels) -> None:
    first = MATRICES["int4-288-32-True-BF16"]
    assert first.scales is not None
    scales = torch.zeros_like(first.scales)
    scales[:, 3] = 0.5
    matrix = QuantMatrix(first.format, first.shape, first.codes, scales, None)
    for dtype in DTYPES:
        x_1K = torch.randn(1, 288).to(dtype)
        x_1K[:, : 3 * GROUP] = 0.0
        assert not linear(kernels, x_1K * (torch.arange(288) // GROUP != 3), matrix).any()
        expected = x_1K.double() @ matrix.dequantise(torch.float64).t()
        torch.testing.assert_close(linear(kernels, x_1K, matrix).double(), expected, rtol=2**-8, atol=2**-12)
