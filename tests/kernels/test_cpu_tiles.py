"""Many rows of x by the library: to the bit what each row alone comes to, whatever the sizes of tiles and calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cpu_cases import LEVELS, linear, needs_library, open_kernels

from offmoe.formats.dense import ExpertWeights
from offmoe.kernels import products
from offmoe.kernels.cpu import CpuKernels
from offmoe.moe import cpu_backend

pytestmark = needs_library

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module", params=LEVELS or ["none"])
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    opened = open_kernels(request.param)
    yield opened
    opened.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(77, 33), (13, 256), (5, 800), (24, 1027)])
def test_many_rows_are_those_alone(kernels: CpuKernels, dtype: torch.dtype, num_outputs: int, num_inputs: int) -> None:
    weight = torch.randn(num_outputs, num_inputs).to(dtype)
    x_TK = torch.randn(71, num_inputs).to(dtype)
    alone = torch.cat([linear(kernels, row[None], weight) for row in x_TK])
    for num_rows in (2, 3, 4, 5, 6, 7, 8, 9, 31, 33, 71):
        assert torch.equal(linear(kernels, x_TK[:num_rows], weight), alone[:num_rows]), f"{num_rows=}"
    expected = x_TK.double() @ weight.double().t()
    limit = torch.finfo(dtype).eps * expected.abs() + 1e-5 * num_inputs**0.5
    assert bool(((alone.double() - expected).abs() <= limit).all())


def test_a_linear_of_more_rows_than_are_prepared_at_a_time(kernels: CpuKernels) -> None:
    num_inputs = (4 << 20) // 256
    weight, x_TK = torch.randn(3, num_inputs).bfloat16(), torch.randn(300, num_inputs).bfloat16()
    got = linear(kernels, x_TK, weight)
    for row in (0, 255, 256, 299):
        assert torch.equal(got[row], linear(kernels, x_TK[row : row + 1], weight)[0])


def test_an_experts_rows_are_cut_where_a_call_is_full() -> None:
    weights = ExpertWeights((torch.zeros(2, 2),), (torch.zeros(2, 2),))
    experts = [
        (idx, weights, [10 * idx + i for i in range(count)], list(range(count)))
        for idx, count in enumerate((3, 7, 0, 2))
    ]
    calls = list(cpu_backend._calls(experts, 4))
    assert [[(idx, tokens) for idx, _, tokens, _ in call] for call in calls] == [
        [(0, [0, 1, 2]), (1, [10])], [(1, [11, 12, 13, 14])], [(1, [15, 16]), (3, [30, 31])]
    ]  # fmt: skip
    assert list(cpu_backend._calls([], 4)) == []


def test_matrices_in_tiles_take_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_faster, expected in ((True, 48), (False, 16)):
        monkeypatch.setattr(products, "float32_is_faster", lambda dtype, is_faster=is_faster: is_faster)
        assert products.most_rows(torch.bfloat16, in_tiles=False) == expected
        assert (products.most_rows(torch.bfloat16, in_tiles=True) > 1 << 40) == is_faster
