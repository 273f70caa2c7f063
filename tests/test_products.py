"""Products of many rows in blocks of float32, against float64."""

from __future__ import annotations

import pytest
import torch

from offmoe.kernels import products
from offmoe.kernels.products import BLOCK_ROWS, LEAST_ROWS, multiply


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "float32_is_faster", lambda dtype: dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [LEAST_ROWS, BLOCK_ROWS + 3])
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.usefixtures("in_float32")
def test_a_product_is_rounded_once(
    dtype: torch.dtype, num_rows: int, is_turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "BLOCK_NUMBERS", 7 * 96)  # seven outputs at a time, and a rest
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, 96, generator=generator).to(dtype)
    weight = torch.randn(96, 40, generator=generator).to(dtype).T if is_turned else torch.randn(40, 96).to(dtype)
    bias = torch.randn(40, generator=generator).to(dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    got = multiply(x.view(1, num_rows, 96), weight, bias)
    assert got.shape == (1, num_rows, 40) and got.dtype == dtype
    # Half a unit of the last place, and float32's own sums.
    limit = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-4
    assert bool(((got[0].double() - expected).abs() <= limit).all())


@pytest.mark.usefixtures("in_float32")
def test_few_rows_and_other_types_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_in_blocks", lambda *args: pytest.fail("in blocks"))
    for num_rows, dtype in ((LEAST_ROWS - 1, torch.bfloat16), (64, torch.float32)):
        x, weight = torch.randn(num_rows, 32).to(dtype), torch.randn(8, 32).to(dtype)
        assert torch.equal(multiply(x, weight), torch.nn.functional.linear(x, weight))


def test_the_way_is_measured_once() -> None:
    products.float32_is_faster.cache_clear()
    assert products.float32_is_faster(torch.bfloat16) in {True, False}
    assert products.float32_is_faster(torch.float32) is False
    assert products.float32_is_faster.cache_info().misses == 2
    products.float32_is_faster(torch.bfloat16)
    assert products.float32_is_faster.cache_info().misses == 2
