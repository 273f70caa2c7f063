"""What quantised bytes mean: bit for bit what the formats' libraries make of them, by rows, from slots, in products."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from offmoe.checkpoint.expert_index import ExpertPart, MoeLayer, QuantPart, Span
from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.checkpoint.quantised import QuantEntry, quant_part
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.formats.dense import view_expert
from offmoe.formats.layout import layout_of
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.reference import ExpertMath, experts_forward

needs_compressed_tensors = pytest.mark.skipif(sys.version_info < (3, 11), reason="compressed-tensors needs Python 3.11")
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also of zeros' signs and of NaNs."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def random_matrix(kind: str, num_rows: int, width: int, group: int, *, symmetric: bool = True) -> QuantMatrix:
    generator = _generator()

    def words(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (rows, columns), generator=generator, dtype=torch.int32)

    scales = torch.rand(num_rows, width // group, generator=generator).bfloat16()
    per_word = 8 if kind == "int4" else 4
    form = QuantFormat(kind=kind, group=group, symmetric=symmetric, offset=1 << (32 // per_word - 1))  # type: ignore[arg-type]
    zeros = None if symmetric else words(-(-num_rows // per_word), width // group)
    return QuantMatrix(form, (num_rows, width), words(num_rows, width // per_word), scales, zeros)


@needs_compressed_tensors
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, None), (8, 32), (8, None)])
def test_integers_bit_for_bit(bits: int, group: int | None, symmetric: bool, scale_dtype: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    matrix = random_matrix(f"int{bits}", 21, 64, group or 64, symmetric=symmetric)
    scales = matrix.scales.to(DTYPES[scale_dtype])
    matrix = QuantMatrix(matrix.format, matrix.shape, matrix.codes, scales, matrix.zeros)
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, symmetric=symmetric, **strategy)
    )
    state = {"weight_packed": matrix.codes, "weight_scale": scales, "weight_shape": torch.tensor(matrix.shape)}
    if matrix.zeros is not None:
        state["weight_zero_point"] = matrix.zeros
    library = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
    assert same_bits(matrix.dequantise(DTYPES[scale_dtype]), library)
    assert same_bits(matrix.dequantise(torch.bfloat16), library.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_bit_for_bit(dtype: torch.dtype) -> None:
    """Every byte, every exponent whose results a bfloat16 holds as an ordinary number."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 250, 16, 16).contiguous()
    scales = torch.arange(2, 252, dtype=torch.uint8).view(1, 250, 1).expand(1, 250, 16).contiguous()
    library = convert_moe_packed_tensors(codes, scales, dtype=dtype)[0].T.contiguous()
    form = QuantFormat(kind="mxfp4", group=32, scale_dtype="U8")
    matrix = QuantMatrix(form, (250, 512), codes[0].flatten(1), scales[0], None)
    assert same_bits(matrix.dequantise(dtype), library)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_nans", [True, False])
def test_fp8_bit_for_bit(with_nans: bool, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(32, 1)
    if not with_nans:
        codes[(codes & 127) == 127] = 0
    codes = codes.view(torch.float8_e4m3fn)
    scales = torch.rand(4, 8, generator=_generator())
    library = Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)
    matrix = QuantMatrix(QuantFormat(kind="fp8", group=32, group_rows=8), (32, 256), codes, scales, None)
    got = matrix.dequantise(dtype)
    assert torch.equal(got.isnan(), library.isnan())
    assert same_bits(got.nan_to_num(), library.nan_to_num())


def test_fp8_blocks_that_pass_the_edge() -> None:
    """DeepSeek-V3 has matrices of 576 rows: the last block of 128 is cut."""
    codes = torch.randn(20, 50, generator=_generator()).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 4, generator=_generator())
    matrix = QuantMatrix(QuantFormat(kind="fp8", group=16, group_rows=8), (20, 50), codes, scales, None)
    full = scales.repeat_interleave(8, 0)[:20].repeat_interleave(16, 1)[:, :50]
    assert same_bits(matrix.dequantise(torch.float32), codes.float() * full)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_are_rows_of_the_whole(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["int4", "int8", "fp8", "mxfp4"]))
    num_rows = data.draw(st.integers(1, 70))
    if kind == "fp8":
        codes = torch.randn(num_rows, 48, generator=_generator()).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-num_rows // 16), 3, generator=_generator())
        matrix = QuantMatrix(QuantFormat(kind="fp8", group=16, group_rows=16), (num_rows, 48), codes, scales, None)
    elif kind == "mxfp4":
        codes = torch.randint(0, 256, (num_rows, 32), dtype=torch.uint8, generator=_generator())
        scales = torch.randint(100, 140, (num_rows, 2), dtype=torch.uint8, generator=_generator())
        form = QuantFormat(kind="mxfp4", group=32, scale_dtype="U8")
        matrix = QuantMatrix(form, (num_rows, 64), codes, scales, None)
    else:
        matrix = random_matrix(kind, num_rows, 64, 32, symmetric=data.draw(st.booleans()))
    begin = data.draw(st.integers(0, num_rows - 1))
    end = data.draw(st.integers(begin + 1, num_rows))
    whole = matrix.dequantise(torch.float32)
    assert same_bits(matrix.dequantise(torch.float32, slice(begin, end)), whole[begin:end])
    blocks = [matrix.dequantise(torch.float32, rows) for rows in matrix.row_blocks()]
    assert same_bits(torch.cat(blocks), whole)


def _entry(name: str, dtype: str, shape: tuple[int, ...], tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(name=name, dtype=dtype, shape=shape, file_idx=0, start=0, num_bytes=tensor.nbytes)


def _as_entry(matrix: QuantMatrix) -> QuantEntry:
    zeros = matrix.zeros
    return QuantEntry(
        name="w", shape=matrix.shape, format=matrix.format,
        codes=_entry("w_packed", "I32", tuple(matrix.codes.shape), matrix.codes),
        scales=_entry("w_scale", "BF16", tuple(matrix.scales.shape), matrix.scales),
        zeros=None if zeros is None else _entry("w_zero_point", "I32", tuple(zeros.shape), zeros),
    )  # fmt: skip


def _layer_of(matrix: QuantMatrix, part: QuantPart) -> tuple[MoeLayer, torch.Tensor]:
    """A layer of one expert with `part` as its down projection and a plain matrix above it, and its device slot."""
    stored = [matrix.codes, matrix.scales, *([] if matrix.zeros is None else [matrix.zeros])]
    up = torch.randn(matrix.shape[1], 8, generator=_generator())
    tensors = [*stored, up]
    up_part = ExpertPart(source_idx=len(stored), offset=0, shape=(matrix.shape[1], 8), strides=(8, 1), dtype="F32")
    spans = tuple(Span(file_idx=0, start=0, num_bytes=tensor.nbytes) for tensor in tensors)
    layer = MoeLayer(
        name="experts", num_experts=1, top_k=1, up=(up_part,), down=(part,), transposed=False, spans=(spans,)
    )
    layout = layout_of(layer)
    slot = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    for tensor, offset in zip(tensors, layout.offsets, strict=True):
        slot[offset : offset + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    return layer, slot


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_second_row_of_a_slot(symmetric: bool) -> None:
    """Interleaved gate and up rows are strided views; packed zero points cannot be taken apart."""
    matrix = random_matrix("int4", 32, 64, 32, symmetric=symmetric)
    part = quant_part(_as_entry(matrix), (0, 1, 2), first_row=1, num_rows=16, row_step=2)
    if not symmetric:
        assert part is None
        part = quant_part(_as_entry(matrix), (0, 1, 2), first_row=8, num_rows=16, row_step=1)
    assert part is not None
    layer, slot = _layer_of(matrix, part)
    (view,) = view_expert(layer, slot, layout_of(layer).offsets).down
    assert isinstance(view, QuantMatrix)
    whole = matrix.dequantise(torch.float32)
    assert same_bits(view.dequantise(torch.float32), whole[1::2] if symmetric else whole[8:24])


def test_a_source_at_an_odd_address() -> None:
    matrix = random_matrix("int8", 16, 64, 32)
    part = quant_part(_as_entry(matrix), (0, 1, 2), first_row=0, num_rows=16, row_step=1)
    assert part is not None
    layer, slot = _layer_of(matrix, part)
    moved = torch.cat([torch.zeros(3, dtype=torch.uint8), slot])
    (view,) = view_expert(layer, moved, tuple(offset + 3 for offset in layout_of(layer).offsets)).down
    assert isinstance(view, QuantMatrix)
    assert same_bits(view.dequantise(torch.float32), matrix.dequantise(torch.float32))


def test_products_of_blocks_are_the_products_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed with a plain matrix, in a layer of 300 outputs cut into blocks of 128 rows."""
    monkeypatch.setattr("offmoe.formats.quantised.BLOCK_VALUES", 128 * 64)
    matrix = random_matrix("int4", 300, 64, 32)
    part = quant_part(_as_entry(matrix), (0, 1), first_row=0, num_rows=300, row_step=1)
    assert part is not None
    assert len(list(matrix.row_blocks())) == 3
    layer, slot = _layer_of(matrix, part)
    weights = view_expert(layer, slot, layout_of(layer).offsets)
    math = ExpertMath(
        activate=torch.relu, up_bias_EF=None, down_bias_ED=None, post_norm=None, transposed=False, dtype=torch.float32
    )
    x_ND = torch.randn(3, 8, generator=_generator())
    plain = weights.up[0]
    assert isinstance(plain, torch.Tensor)
    expected = torch.relu(x_ND @ plain.T) @ matrix.dequantise(torch.float32).T
    assert torch.allclose(experts_forward(math, [(0, weights, x_ND)]), expected, rtol=1e-5, atol=1e-4)
    assert weights.num_weights == 300 * 64 + 64 * 8
    assert layer.bytes_per_weight == pytest.approx(sum(s.num_bytes for s in layer.spans[0]) / weights.num_weights)
