"""The encoder against compressed-tensors, whose format it writes, and against plain rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from makers import one_line

from offmoe.core.errors import CheckpointError
from offmoe.formats import encode as encoder
from offmoe.formats.encode import encode_matrix, integer_format
from offmoe.formats.quantised import QuantMatrix

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
PACKER: Any = BaseCompressor.get_value_from_registry("pack-quantized")


def scheme(kind: str, group: int) -> QuantizationScheme:
    args = QuantizationArgs(
        num_bits=4 if kind == "int4" else 8, type="int", symmetric=True, strategy="group", group_size=group
    )
    return QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")


def weights(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Bell-shaped, with an outlier here and there, as weights have them."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    values = torch.randn(rows, columns, generator=generator) / 16
    values[torch.rand(values.shape, generator=generator) < 0.01] *= 4
    return values.to(dtype)


def squared_error(matrix: QuantMatrix, values: torch.Tensor) -> float:
    return float((matrix.dequantise(torch.float32) - values.float()).square().sum())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_compressed_tensors_reads_the_same_values(kind: str, scale_dtype: str, group: int) -> None:
    dtype = DTYPES[scale_dtype]
    values = weights(24, 256, dtype)
    matrix = encode_matrix(values, integer_format(kind, group=group, scale_dtype=scale_dtype), name="w")
    state = {
        "weight_packed": matrix.codes, "weight_scale": matrix.scales, "weight_shape": torch.tensor(values.shape),
    }  # fmt: skip
    theirs = PACKER.decompress(state, scheme(kind, group))["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(theirs, matrix.dequantise(dtype))


@pytest.mark.parametrize(("kind", "most"), [("int4", 0.9), ("int8", 1.001)])
def test_less_error_than_scales_that_just_cover_the_largest(kind: str, most: float) -> None:
    values = weights(64, 256)
    matrix = encode_matrix(values, integer_format(kind, group=32, scale_dtype="F32"), name="w")
    how = scheme(kind, 32)
    grouped = values.view(64, -1, 32)
    assert how.weights is not None
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), how.weights)
    state = PACKER.compress({"weight": values, "weight_scale": scale, "weight_zero_point": zero}, how)
    theirs = float((PACKER.decompress(state, how)["weight"] - values).square().sum())
    assert squared_error(matrix, values) <= most * theirs


def test_numbers_that_the_format_has_come_back_as_they_were() -> None:
    steps = torch.randint(-8, 8, (8, 64), generator=torch.Generator().manual_seed(1))
    steps[:, 0::32] = -8
    values = steps * 0.25
    matrix = encode_matrix(values, integer_format("int4", group=32, scale_dtype="BF16"), name="w")
    assert torch.equal(matrix.dequantise(torch.float32), values)


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_zeros_stay_zeros_and_tiny_numbers_finite(kind: str, scale_dtype: str) -> None:
    values = torch.zeros(4, 64)
    values[1] = 1e-42
    values[2, 3] = 1.0
    matrix = encode_matrix(values, integer_format(kind, group=32, scale_dtype=scale_dtype), name="w")
    read = matrix.dequantise(torch.float32)
    assert torch.equal(read[0], values[0]) and bool(torch.isfinite(matrix.scales).all())
    assert float(read[1].abs().max()) < 1e-30
    assert torch.allclose(read[2], values[2], rtol=0.01) and torch.equal(read[3], values[3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(bad: float) -> None:
    values = weights(4, 64)
    values[3, 40] = bad
    with pytest.raises(CheckpointError, match=r"'layers\.0\.w' holds numbers that are not finite") as caught:
        encode_matrix(values, integer_format("int4", group=32, scale_dtype="BF16"), name="layers.0.w")
    one_line(caught)


def test_a_row_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    values, form = weights(13, 96), integer_format("int4", group=32, scale_dtype="BF16")
    whole = encode_matrix(values, form, name="w")
    monkeypatch.setattr(encoder, "BLOCK_VALUES", 200)  # two rows a block, and one that is left
    pieces = encode_matrix(values, form, name="w")
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.scales, pieces.scales)
