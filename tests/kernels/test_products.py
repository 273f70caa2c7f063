"""Products of many rows in blocks of float32, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from offmoe.kernels import products
from offmoe.kernels.products import BLOCK_ROWS, LEAST_ROWS, multiply


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "float32_is_faster", lambda dtype: dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [LEAST_ROWS, BLOCK_ROWS + 3])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.usefixtures("in_float32")
def test_a_product_is_rounded_once(
    dtype: torch.dtype, num_rows: int, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "BLOCK_NUMBERS", 7 * 96)  # seven outputs at a time, and a rest
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, 96, generator=generator).to(dtype)
    weight = torch.randn(96, 40, generator=generator).to(dtype).T if is_transposed else torch.randn(40, 96).to(dtype)
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


@pytest.fixture
def asked_anew() -> Iterator[None]:
    products.float32_is_faster.cache_clear()
    yield
    products.float32_is_faster.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_without_kernels_of_its_type_float32_is_faster_and_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour on the cores turned the measurement round: two processes then multiplied in different ways."""
    monkeypatch.setattr(products, "_HAS_KERNELS", {torch.bfloat16: lambda: False})
    monkeypatch.setattr(products, "_in_blocks", lambda *args: pytest.fail("measured"))
    assert products.float32_is_faster(torch.bfloat16) is True
    assert products.float32_is_faster(torch.float32) is False


@pytest.mark.parametrize(("own_s", "is_faster"), [(1.4, False), (1.6, True)])
@pytest.mark.usefixtures("asked_anew")
def test_with_kernels_of_its_type_it_is_measured_once(
    own_s: float, is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_HAS_KERNELS", {torch.bfloat16: lambda: True})
    seconds = [own_s, 1.0] * products._TRIES  # torch's own way, then float32
    clock = itertools.accumulate(part for took in seconds for part in (0.0, took))
    monkeypatch.setattr(products.time, "perf_counter", lambda: next(clock))
    assert products.float32_is_faster(torch.bfloat16) is is_faster
    assert products.float32_is_faster(torch.bfloat16) is is_faster
    assert list(clock) == []
