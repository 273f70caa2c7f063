"""Quantised checkpoints that lie, lack parts, or are of a kind that is not read: one line each, names and numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from makers import one_line
from quant_makers import edit, save_fp8, save_mxfp4

import offmoe
from offmoe.checkpoint.quant_config import Quantisation, read_quantisation
from offmoe.checkpoint.quantised import QuantEntry, join_quantised
from offmoe.checkpoint.tensor_entry import ITEM_BITS, TensorEntry
from offmoe.cli.main import main
from offmoe.core.errors import CheckpointError, OffmoeError, UnsupportedModelError

INT4 = Quantisation(method="compressed-tensors", num_bits=frozenset({4}), groups=frozenset({32}))
MIXED = Quantisation(method="compressed-tensors", num_bits=frozenset({4, 8}), groups=frozenset({32, -1}))
FP8 = Quantisation(method="fp8", block=(128, 128))
ROWS = Quantisation(method="compressed-tensors", groups=frozenset({-1}))
MXFP4 = Quantisation(method="mxfp4")
Shapes = dict[str, tuple[str, tuple[int, ...]]]
PACKED: Shapes = {
    "a.weight_packed": ("I32", (16, 8)), "a.weight_scale": ("BF16", (16, 2)), "a.weight_shape": ("I64", (2,)),
    "norm.weight": ("BF16", (64,)),
}  # fmt: skip
ZEROS: Shapes = {"a.weight_zero_point": ("I32", (2, 2))}
BLOCKS: Shapes = {"a.weight": ("F8_E4M3", (576, 200)), "a.weight_scale_inv": ("F32", (5, 2))}
GPT: Shapes = {"up_blocks": ("U8", (4, 10, 3, 16)), "up_scales": ("U8", (4, 10, 3)), "up_bias": ("BF16", (4, 10))}


def join(shapes: Shapes, quantisation: Quantisation, stated: tuple[int, int] = (16, 64)) -> dict[str, Any]:
    tensors = {}
    for name, (dtype, shape) in shapes.items():
        num_bytes = ITEM_BITS[dtype] // 8
        for size in shape:
            num_bytes *= size
        tensors[name] = TensorEntry(name=name, dtype=dtype, shape=shape, file_idx=0, start=0, num_bytes=num_bytes)
    stated_bytes = b"".join(number.to_bytes(8, "little", signed=True) for number in stated)
    return dict(join_quantised(tensors, quantisation, lambda entry: stated_bytes))


def test_parts_become_one_tensor() -> None:
    found = join(PACKED | ZEROS | {"a.input_scale": ("F32", (1,))}, INT4)
    assert found.keys() == {"a.weight", "norm.weight"}
    entry = found["a.weight"]
    assert isinstance(entry, QuantEntry)
    assert entry.shape == (16, 64)
    assert (entry.format.kind, entry.format.group, entry.format.offset) == ("int4", 32, 8)
    assert entry.num_bytes == 16 * 8 * 4 + 16 * 2 * 2 + 2 * 2 * 4
    assert entry.dtype == "int4, groups of 32, with zero points"
    blocks = join(BLOCKS, FP8)["a.weight"]
    assert (blocks.shape, blocks.dtype) == ((576, 200), "fp8, blocks of 128 x 128")
    stacked = join(GPT, MXFP4)
    assert stacked.keys() == {"up", "up_bias"}
    assert stacked["up"].shape == (4, 10, 96)


@pytest.mark.parametrize("scale_dtype", ["F32", "BF16", "F16"])
def test_scales_of_any_float(scale_dtype: str) -> None:
    """DeepSeek's fp8 has float32 scales, Qwen's bfloat16."""
    entry = join(BLOCKS | {"a.weight_scale_inv": (scale_dtype, (5, 2))}, FP8)["a.weight"]
    assert entry.format.scale_dtype == scale_dtype


@pytest.mark.parametrize(("stated", "kind", "width"), [((16, 64), "int4", 64), ((16, 32), "int8", 32)])
def test_bits_that_the_config_leaves_open(stated: tuple[int, int], kind: str, width: int) -> None:
    """One whole row a scale fits int4 and int8 alike; `weight_shape` tells them apart."""
    entry = join(PACKED | {"a.weight_scale": ("BF16", (16, 1))}, MIXED, stated)["a.weight"]
    assert (entry.format.kind, entry.format.group, entry.shape[1]) == (kind, width, width)


LIES: list[tuple[str, Shapes, Quantisation, tuple[str, ...]]] = [
    ("no scales", {"a.weight_packed": ("I32", (16, 8))}, INT4, ("'a.weight_packed'", "'a.weight_scale'")),
    ("group does not divide", PACKED | {"a.weight_scale": ("BF16", (16, 3))}, INT4, ("[16, 8]", "[16, 3]", "64 col")),
    ("group of another size", PACKED | {"a.weight_scale": ("BF16", (16, 4))}, INT4, ("groups of 32", "16 columns")),
    ("too few rows of scales", PACKED | {"a.weight_scale": ("BF16", (15, 2))}, INT4, ("[15, 2]", "16 rows")),
    ("no scale at all", PACKED | {"a.weight_scale": ("BF16", (16, 0))}, INT4, ("[16, 0]",)),
    ("a number for scales", PACKED | {"a.weight_scale": ("BF16", ())}, INT4, ("[]",)),
    ("scales of integers", PACKED | {"a.weight_scale": ("I32", (16, 2))}, INT4, ("I32", "BF16, F16, F32")),
    ("codes of floats", PACKED | {"a.weight_packed": ("F32", (16, 8))}, INT4, ("F32", "I32")),
    ("codes without columns", PACKED | {"a.weight_packed": ("I32", (16, 0))}, INT4, ("[16, 0]",)),
    ("codes of one dimension", PACKED | {"a.weight_packed": ("I32", (128,))}, INT4, ("[128]",)),
    ("zeros of another shape", PACKED | {"a.weight_zero_point": ("I32", (16, 2))}, INT4, ("[16, 2]", "2 rows of 2")),
    ("zeros of bytes", PACKED | {"a.weight_zero_point": ("I8", (2, 2))}, INT4, ("I8",)),
    ("plain and quantised", PACKED | {"a.weight": ("BF16", (16, 64))}, INT4, ("'a.weight'", "twice")),
    ("plain weights", {"a.weight": ("BF16", (16, 64))}, INT4, ("none of its 1 tensors",)),
    ("scales alone", PACKED | {"b.weight_scale": ("BF16", (16, 2))}, INT4, ("'b.weight_scale'",)),
    ("bytes without scales", {"a.weight": ("I8", (16, 64))}, INT4, ("'a.weight_scale'",)),
    ("no blocks' scales", {"a.weight": ("F8_E4M3", (16, 64))}, FP8, ("'a.weight_scale_inv'",)),
    ("too few blocks", BLOCKS | {"a.weight_scale_inv": ("F32", (4, 2))}, FP8, ("[4, 2]", "blocks of 128 x 128")),
    ("blocks' scales alone", BLOCKS | {"b.weight_scale_inv": ("F32", (5, 2))}, FP8, ("'b.weight_scale_inv'",)),
    ("blocks' scales of bytes", BLOCKS | {"a.weight_scale_inv": ("F8_E8M0", (5, 2))}, FP8, ("F8_E8M0", "F32")),
    ("one scale for e4m3", {"a.weight": ("F8_E4M3", (16, 64)), "a.weight_scale": ("F32", (1,))}, ROWS, ("[1]",)),
    ("blocks for rows", {"a.weight": ("F8_E4M3", (16, 64)), "a.weight_scale": ("F32", (16, 2))}, ROWS, ("[16, 2]",)),
    ("no scales a row", {"a.weight": ("F8_E4M3", (16, 64))}, ROWS, ("'a.weight_scale'",)),
    ("no exponents", {"up_blocks": ("U8", (4, 10, 3, 16))}, MXFP4, ("'up_scales'",)),
    ("blocks of 17 bytes", GPT | {"up_blocks": ("U8", (4, 10, 3, 17))}, MXFP4, ("[4, 10, 3, 17]",)),
    ("fewer exponents", GPT | {"up_scales": ("U8", (4, 10, 2))}, MXFP4, ("[4, 10, 2]", "32 columns")),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "quantisation", "words"), [case[1:] for case in LIES], ids=[c[0] for c in LIES])
def test_lying_headers(shapes: Shapes, quantisation: Quantisation, words: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        join(shapes, quantisation)
    message = one_line(caught)
    assert all(word in message for word in words), message


def test_a_width_that_no_number_of_bits_fits() -> None:
    with pytest.raises(CheckpointError) as caught:
        join(PACKED, MIXED, (16, 2**62))
    assert "8 words a row" in one_line(caught)
    with pytest.raises(CheckpointError, match="weight_shape of two numbers"):
        join({name: value for name, value in PACKED.items() if "shape" not in name}, MIXED)


def test_reordered_columns_are_not_read() -> None:
    with pytest.raises(UnsupportedModelError, match=r"a\.weight_g_idx"):
        join(PACKED | {"a.weight_g_idx": ("I32", (64,))}, INT4)


def _groups(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
    group["weights"] |= weights  # type: ignore[operator]
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


CONFIGS: list[tuple[dict[str, Any], type[OffmoeError], tuple[str, ...]]] = [
    ({"quant_method": "gptq"}, UnsupportedModelError, ("'gptq'", "offmoe quantize SOURCE TARGET --expert-format int4")),
    ({"quant_method": "awq"}, UnsupportedModelError, ("'awq'", "offmoe quantize")),
    ({"quant_method": "bitsandbytes"}, UnsupportedModelError, ("bitsandbytes", "bfloat16")),
    ({"quant_method": "\x1b[2Jwhat"}, UnsupportedModelError, ("what", "not read yet")),
    ({"quant_method": 3}, CheckpointError, ("quant_method",)),
    ({}, CheckpointError, ("quant_method",)),
    (_groups(num_bits=3), UnsupportedModelError, ("3 bits", "4 or 8")),
    (_groups(num_bits=[4]), UnsupportedModelError, ("[4] bits",)),
    (_groups(type="float"), UnsupportedModelError, ("'float'",)),
    (_groups(type="float", num_bits=8), UnsupportedModelError, ("'pack-quantized'", "float-quantized")),
    (
        _groups(type="float", num_bits=8, strategy="block", block_structure="16x16") | {"format": "float-quantized"},
        CheckpointError,
        ("'16x16'",),
    ),
    (_groups(strategy="tensor"), UnsupportedModelError, ("'tensor'", "channel")),
    (_groups(group_size=0), CheckpointError, ("groups of 0",)),
    (_groups(group_size="32"), CheckpointError, ("groups of '32'",)),
    (_groups(actorder="group"), UnsupportedModelError, ("actorder",)),
    (_groups() | {"format": "nvfp4-pack-quantized"}, UnsupportedModelError, ("nvfp4-pack-quantized",)),
    (_groups() | {"format": {}}, UnsupportedModelError, ("{}",)),
    (_groups() | {"config_groups": {}}, CheckpointError, ("config_groups",)),
    (_groups() | {"config_groups": {"W4A16": ["Linear"]}}, CheckpointError, ("'W4A16'",)),
    (_groups() | {"quantization_status": "frozen"}, UnsupportedModelError, ("'frozen'",)),
    (_groups() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, UnsupportedModelError, ("sparse-24",)),
    (_groups() | {"transform_config": {"R1": {}}}, UnsupportedModelError, ("transform_config",)),
    ({"quant_method": "fp8"}, UnsupportedModelError, ("weight_block_size",)),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, CheckpointError, ("[0, 128]",)),
    ({"quant_method": "fp8", "weight_block_size": "128"}, CheckpointError, ("'128'",)),
    ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, UnsupportedModelError, ("e5m2",)),
]


@pytest.mark.parametrize(("config", "kind", "words"), CONFIGS)
def test_configs_that_are_not_read(config: dict[str, Any], kind: type[OffmoeError], words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught:
        read_quantisation({"quantization_config": config})
    message = one_line(caught)
    assert all(word in message for word in words), message


def test_configs_that_are_read() -> None:
    assert read_quantisation({"hidden_size": 8, "quantization_config": None}) is None
    assert read_quantisation({"compression_config": _groups()}) == INT4
    assert read_quantisation({"text_config": {"quantization_config": _groups()}}) == INT4
    channel = read_quantisation({"quantization_config": _groups(strategy=None, group_size=-1)})
    assert channel is not None
    assert channel.groups == {-1}


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mxfp4")
    save_mxfp4(folder)
    return folder


def _copy(source: Path, folder: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def _refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        offmoe.load(folder, ram="4GiB")
    return one_line(caught)


def test_experts_that_are_not_as_the_config_says(gpt: Path, tmp_path: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor], _: Any) -> None:
        for part in ("blocks", "scales"):
            name = f"model.layers.0.mlp.experts.gate_up_proj_{part}"
            tensors[name] = tensors[name].repeat(1, 1, 2, *[1] * (part == "blocks"))

    edit(_copy(gpt, tmp_path), widen)
    assert "[64, 64]" in (message := _refused(tmp_path)) and "[128, 64]" in message


def test_one_expert_in_another_format(tmp_path: Path) -> None:
    """A lone expert kept in bfloat16 among quantised ones is told by its name."""
    save_fp8(tmp_path, "qwen3_moe")

    def keep_one(tensors: dict[str, torch.Tensor], _: Any) -> None:
        name = "model.layers.0.mlp.experts.3.up_proj.weight"
        tensors[name] = tensors[name].float()
        del tensors[f"{name}_scale_inv"]

    edit(tmp_path, keep_one)
    assert "experts.3.up_proj.weight' is F32" in (message := _refused(tmp_path)) and "fp8" in message


def test_the_command_line_says_it_in_one_line(gpt: Path, tmp_path: Path) -> None:
    def lose(tensors: dict[str, torch.Tensor], _: Any) -> None:
        del tensors["model.layers.1.mlp.experts.down_proj_scales"]

    edit(_copy(gpt, tmp_path), lose)
    for command in (["inspect", str(tmp_path)], ["generate", str(tmp_path), "--prompt", "x"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2, result.output
        assert "experts.down_proj_scales" in result.output


def test_inspect_names_the_formats(gpt: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(gpt)])
    assert result.exit_code == 0, result.output
    assert "mxfp4" in result.output
    found = json.loads(CliRunner().invoke(main, ["inspect", str(gpt), "--json"]).output)
    assert found["formats"]["mxfp4"] == found["experts_total_bytes"]
    assert found["experts_per_layer"] == 8
