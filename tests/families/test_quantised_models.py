"""Quantised checkpoints, as the libraries of their formats write them: the logits and ids of the dequantised model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import load
from makers import Measured
from quant_makers import (
    Scheme,
    decompressed_model,
    dequantised_model,
    edit,
    save_compressed,
    save_fp8,
    save_mxfp4,
)
from transformers import PreTrainedModel

import offmoe
from offmoe.checkpoint.expert_index import QuantPart
from offmoe.planner.inspect import inspect_checkpoint
from offmoe.tiers.device import SimulatedDevice

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
needs_compressed_tensors = pytest.mark.skipif(sys.version_info < (3, 11), reason="compressed-tensors needs Python 3.11")
NUM_PROMPT, NUM_NEW = 12, 24
PARTS = ("gate", "up", "down")
INT4 = Scheme(bits=4, group=16)
COMPRESSED: dict[str, tuple[str, Scheme]] = {
    "int4": ("qwen3_moe", INT4),
    "int4 asymmetric": ("qwen3_moe", Scheme(bits=4, group=32, symmetric=False)),
    "int4 channel": ("mixtral", Scheme(bits=4, group=None)),
    "int4, others int8": ("qwen3_moe", Scheme(bits=4, group=32, dense_bits=8)),
    "int8, others int4": ("deepseek_v3", Scheme(bits=8, group=16, dense_bits=4, symmetric=False)),
    "int8 packed": ("qwen3_moe", Scheme(bits=8, group=16)),
    "int8 packed asymmetric": ("qwen3_moe", Scheme(bits=8, group=16, symmetric=False)),
    "int8 channel": ("qwen3_moe", Scheme(bits=8, group=None, storage="int-quantized", activations=True)),
    "fp8 channel": ("qwen3_moe", Scheme(bits=8, group=None, storage="float-quantized", kind="float")),
    "fp8 blocks": ("qwen3_moe", Scheme(bits=8, group=None, storage="float-quantized", kind="float", block=[16, 32])),
    "int8 plain": ("deepseek_v3", Scheme(bits=8, group=32, storage="naive-quantized", symmetric=False)),
}


def form_of(scheme: Scheme) -> str:
    """In the words of the models table."""
    return "fp8" if scheme.kind == "float" else f"int{scheme.bits}"


SERVING: dict[str, Callable[[], dict[str, Any]]] = {
    "ram": dict,
    "ahead": lambda: {"prefetch": 1},
    "device": lambda: {"miss": "stream", "simulated": SimulatedDevice(1e9)},
    "beside a device": lambda: {"miss": "cpu", "simulated": SimulatedDevice(1e9)},
}


def _equals(
    folder: Path, expected: PreTrainedModel, measured: Callable[[torch.Tensor, torch.Tensor], None],
    num_new: int = NUM_NEW, **options: Any,
) -> None:  # fmt: skip
    ids = torch.randint(3, 100, (2, NUM_PROMPT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = expected(input_ids=ids).logits
    wanted_ids = expected.generate(ids[:1], max_new_tokens=num_new, do_sample=False)[0, NUM_PROMPT:].tolist()
    with load(folder, ram="4GiB", expert_slots=4, **options) as engine:
        with torch.no_grad():
            got = engine.model(input_ids=ids).logits
        measured(got, wanted)
        reply = engine.generate(ids[0].tolist(), max_new_tokens=num_new, temperature=0, ignore_eos=True)
        assert list(reply.token_ids) == wanted_ids
        experts = engine._parts.experts
        assert all(isinstance(part, QuantPart) for layer in experts.layers for part in (*layer.up, *layer.down))
        assert engine.stats()["misses"] > 0
        assert inspect_checkpoint(folder).experts_total_bytes == experts.num_bytes


@needs_compressed_tensors
@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_equals_what_compressed_tensors_unpacks(case: str, tmp_path: Path, measured: Measured) -> None:
    name, scheme = COMPRESSED[case]
    save_compressed(tmp_path, name, scheme)
    serving = list(SERVING.values())[len(case) % len(SERVING)]
    form = partial(measured, name, form_of(scheme))
    _equals(tmp_path, decompressed_model(tmp_path, scheme), form, **serving())


@needs_compressed_tensors
@pytest.mark.parametrize("how", SERVING)
def test_packed_experts_equal_transformers(how: str, tmp_path: Path, measured: Measured) -> None:
    save_compressed(tmp_path, "qwen3_moe", INT4)
    _equals(tmp_path, dequantised_model(tmp_path), partial(measured, "qwen3_moe", "int4"), **SERVING[how]())


# Published per expert under names and in orders of their own; the others are published stacked, which nobody packs.
PER_EXPERT = (
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "deepseek_v4", "dots1", "dots3_note", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe", "hy_v3", "jamba", "kimi_linear", "kolibri1", "laguna",
    "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe",
    "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen4_exp", "solar_open",
)  # fmt: skip


@needs_compressed_tensors
@pytest.mark.parametrize("name", PER_EXPERT)
def test_every_family_published_per_expert(name: str, tmp_path: Path, measured: Measured) -> None:
    scheme = Scheme(bits=8, group=None, dense_bits=8, overrides={})
    save_compressed(tmp_path, name, scheme)
    _equals(tmp_path, decompressed_model(tmp_path, scheme), partial(measured, name, "int8"), num_new=4)


FP8 = ("deepseek_v3", "qwen3_moe")


@pytest.mark.parametrize("how", SERVING)
@pytest.mark.parametrize("name", FP8)
def test_fp8_equals_transformers(name: str, how: str, tmp_path: Path, measured: Measured) -> None:
    save_fp8(tmp_path, name)
    _equals(tmp_path, dequantised_model(tmp_path), partial(measured, name, "fp8"), **SERVING[how]())


@pytest.mark.parametrize("how", SERVING)
def test_mxfp4_equals_transformers(how: str, tmp_path: Path, measured: Measured) -> None:
    save_mxfp4(tmp_path)
    _equals(tmp_path, dequantised_model(tmp_path), partial(measured, "gpt_oss", "mxfp4"), **SERVING[how]())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_resident_weights_are_transformers_to_the_bit(scales: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    """Attention and shared experts are fp8 too; Qwen publishes bfloat16 scales, DeepSeek float32."""
    save_fp8(tmp_path, "deepseek_v3", dtype=dtype)

    def store_as(tensors: dict[str, torch.Tensor], _: Any) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].to(scales)

    edit(tmp_path, store_as)
    expected = dequantised_model(tmp_path, dtype)
    with offmoe.load(tmp_path, ram="4GiB", expert_slots=4) as engine:
        for name, param in engine.model.named_parameters():
            wanted = expected.get_parameter(name)
            if name.endswith("gate.weight"):  # transformers 5.24 rounds it here, and keeps it in float32 elsewhere
                param = param.to(wanted.dtype)
            assert param.dtype == wanted.dtype, name
            assert torch.equal(param, wanted), name
        assert any("fp8" in note and "computes in" in note for note in engine.stats()["notes"])


def test_weights_only_quantisation_needs_no_note(tmp_path: Path) -> None:
    save_mxfp4(tmp_path)
    with offmoe.load(tmp_path, ram="4GiB", expert_slots=4) as engine:
        assert not any("activations" in note for note in engine.stats().get("notes", ()))


@pytest.mark.parametrize("direct", ["direct", "buffered"])
def test_cached_equals_uncached_in_bfloat16(direct: str, tmp_path: Path) -> None:
    """Experts in slots at whatever offsets the files have, all in memory or few, give the same ids and logits."""
    save_mxfp4(tmp_path, dtype=torch.bfloat16)
    ids = torch.randint(3, 100, (1, NUM_PROMPT), generator=torch.Generator().manual_seed(1))
    found = []
    for slots in (4, 24):
        with offmoe.load(tmp_path, ram="4GiB", expert_slots=slots, io=direct) as engine, torch.no_grad():
            found.append(engine.model(input_ids=ids).logits)
            with engine._parts.uncached():
                found.append(engine.model(input_ids=ids).logits)
    assert all(torch.equal(logits, found[0]) for logits in found[1:])


def test_stacked_fp8_is_what_its_experts_are(tmp_path: Path) -> None:
    """One tensor for all experts of a layer and one for their scales. transformers 5.23 forgets those scales."""
    save_fp8(tmp_path, "qwen3_moe")
    ids = torch.randint(3, 100, (1, NUM_PROMPT), generator=torch.Generator().manual_seed(1))

    def stack(tensors: dict[str, torch.Tensor], _: Any) -> None:
        names = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
        for layer in names:
            for suffix, stacked in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
                one = [
                    {part: tensors.pop(f"{layer}.experts.{expert}.{part}_proj.{suffix}") for part in PARTS}
                    for expert in range(8)
                ]
                tensors[f"{layer}.experts.gate_up_proj{stacked}"] = torch.stack(
                    [torch.cat([parts["gate"], parts["up"]]) for parts in one]
                )
                tensors[f"{layer}.experts.down_proj{stacked}"] = torch.stack([parts["down"] for parts in one])

    found = []
    for change in (lambda *_: None, stack):
        edit(tmp_path, change)
        with offmoe.load(tmp_path, ram="4GiB", expert_slots=4) as engine, torch.no_grad():
            found.append(engine.model(input_ids=ids).logits)
            assert all(layer.is_quantised for layer in engine._parts.experts.layers)
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-5)
