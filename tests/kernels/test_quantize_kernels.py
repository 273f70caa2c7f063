"""Codes and scales by the CPU kernels: the same bytes as PyTorch's, and the threads of a run that is cut off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from cpu_cases import LEVELS, open_kernels

from offmoe.checkpoint.background import BackgroundIterator
from offmoe.core.errors import CheckpointError
from offmoe.formats import encode as reference
from offmoe.kernels.cpu import CpuKernels
from offmoe.kernels.cpu.quantise import encode_by_library
from offmoe.quantize.plan import GROUPS

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# PyTorch adds in another order on other processors, and both are then right (kernels/cpu/quantise.py).
same_order = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="PyTorch adds in an order of its own here"
)


@pytest.fixture(scope="module", params=LEVELS or ["none"])
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    opened = open_kernels(request.param, threads=2)
    yield opened
    opened.close()


def rows() -> torch.Tensor:
    """Float32 rows of 384 columns: of every size that numbers have, and all those that a search may trip over."""
    generator = torch.Generator().manual_seed(7)

    def normal(count: int = 5) -> torch.Tensor:
        return torch.randn(count, 384, generator=generator)

    outlier = normal() / 1000
    outlier[:, ::100] = 50.0
    sizes = torch.pow(10.0, torch.randint(-45, 38, (20, 384), generator=generator).float())
    return torch.cat([
        normal(23) / 30, normal() * torch.exp(2 * normal()), outlier, torch.full((2, 384), 0.37), torch.zeros(2, 384),
        -torch.zeros(2, 384), torch.randint(-8, 8, (3, 384), generator=generator).float(), normal() * 1e-40,
        normal() * 2e-38, normal() * 1e-36, normal() * 1e18, normal() * 7e37, normal().sign() * 3.3e38,
        normal(20) * sizes, normal(20) * sizes.clamp(1e-8, 1e5),
    ])  # fmt: skip


@same_order
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_the_same_bytes_as_pytorch(kernels: CpuKernels, kind: str, group: int, dtype: str) -> None:
    values = rows().to(TYPES[dtype])
    values = torch.where(torch.isfinite(values.float()), values, torch.ones_like(values))
    scale_dtype = "F32" if dtype == "F64" else dtype
    form = reference.integer_format(kind, group=group, scale_dtype=scale_dtype)
    ours, theirs = encode_by_library(kernels, values, form, name="w"), reference.encode_matrix(values, form, name="w")
    assert ours.scales is not None and theirs.scales is not None
    assert ours.codes.dtype == theirs.codes.dtype and ours.scales.dtype == theirs.scales.dtype
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scales.view(torch.uint8), theirs.scales.view(torch.uint8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (4, 191), (6, 100)])
def test_numbers_that_are_none(kernels: CpuKernels, bad: float, place: tuple[int, int]) -> None:
    values = torch.randn(7, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    values[place] = bad
    form = reference.integer_format("int4", group=64, scale_dtype="BF16")
    with pytest.raises(CheckpointError) as caught:
        encode_by_library(kernels, values, form, name="w")
    assert str(caught.value) == "'w' holds numbers that are not finite; download the checkpoint again"


def test_other_groups_and_no_kernels_go_to_pytorch(kernels: CpuKernels) -> None:
    values = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    form = reference.integer_format("int8", group=16, scale_dtype="F32")
    theirs = reference.encode_matrix(values, form, name="w")
    for given in (kernels, None):
        assert torch.equal(encode_by_library(given, values, form, name="w").codes, theirs.codes)


def test_items_ahead_come_in_order_and_errors_where_they_were() -> None:
    def items() -> Iterator[int]:
        yield from range(20)
        raise CheckpointError("torn")

    taken = []
    with pytest.raises(CheckpointError, match="torn"), closing(BackgroundIterator(items(), 3)) as ahead:
        taken.extend(ahead)
    assert taken == list(range(20)) and list(ahead) == []


def test_nothing_runs_after_a_consumer_has_left() -> None:
    made: list[int] = []
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            for number in range(1000):
                made.append(number)
                yield number
        finally:
            closed.set()

    with closing(BackgroundIterator(items(), 2)) as ahead:
        assert next(ahead) == 0
    assert closed.is_set() and len(made) <= 5  # one taken, two waiting, one being handed over, one being made
