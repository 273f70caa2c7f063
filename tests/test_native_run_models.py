"""Joined layers with weights of every kind, with sinks and windows, and beside a layer that cannot be joined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, open_tiny, plain_model, save_tiny
from families import build, save_layout
from quant_makers import Scheme, save_compressed, save_mxfp4
from test_native_layers import logits, steps
from test_native_runs import NUM_NEW, Calls, told_both_ways

from offmoe.kernels.cpu.loader import usable_levels
from offmoe.models.native_attention import AttentionStep
from offmoe.models.native_layer import LayerStep

pytestmark = pytest.mark.skipif(not usable_levels(), reason="the CPU kernels were not built")


@pytest.mark.parametrize("name", ["gpt_oss", "olmoe"])
def test_the_logits_are_transformers_own(name: str, tmp_path: Path) -> None:
    """With sinks and more tokens than the windows of two layers hold; and with norms over all heads."""
    folder = tmp_path
    save_layout(build(name, overrides={"clip_qkv": None}), folder, "published")
    with open_tiny(folder, compile="off", prefetch="off", experts=24) as engine:
        logits(engine, NUM_NEW)
        calls = Calls(engine)
        rows = logits(engine, NUM_NEW)
        assert (calls.runs, calls.single) == (NUM_NEW - 1, 0)
    expected = plain_model(folder).generate(
        torch.tensor([PROMPT]),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    wanted = torch.cat(expected.logits)
    assert (rows - wanted).abs().max() < 1e-5 * wanted.abs().max()


def save_int4(folder: Path) -> None:
    pytest.importorskip("compressed_tensors")
    save_compressed(folder, "qwen3_moe", Scheme(bits=4, group=32, dense_bits=8))


WEIGHTS: dict[str, Callable[[Path], None]] = {
    "bf16": lambda folder: save_layout(build("qwen3_moe", dtype=torch.bfloat16), folder, "published"),
    "bf16 turned": lambda folder: save_layout(build("gpt_oss", dtype=torch.bfloat16), folder, "published"),
    "int4, others int8": save_int4,
    "mxfp4 in float32": save_mxfp4,
    "mxfp4 in bf16": lambda folder: save_mxfp4(folder, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("experts", [24, 9])
def test_weights_of_every_kind_are_joined(weights: str, experts: int, tmp_path: Path) -> None:
    WEIGHTS[weights](tmp_path)
    runs, single = told_both_ways(tmp_path, experts=experts)
    assert runs >= NUM_NEW - 1
    assert single == 0


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_an_attention_that_fails_its_comparison_keeps_its_layer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = save_tiny(tmp_path / "model", name), AttentionStep.run

    def wrong(step: AttentionStep, *args: Any) -> torch.Tensor:
        return other(step, *args) + (step.module.layer_idx == 1)

    monkeypatch.setattr(AttentionStep, "run", wrong)
    with open_tiny(folder, compile="off", prefetch="off", experts=24) as engine:
        rows = torch.cat([logits(engine, NUM_NEW), logits(engine, NUM_NEW)])
        assert [step.module.layer_idx for step in steps(engine, AttentionStep)] == [0, 2]
        assert [step.attention.module.layer_idx for step in steps(engine, LayerStep)] == [0, 2]
        calls = Calls(engine)
        logits(engine, 4)
        # Before and after it; with windows there is a mask then, which only torch needs: the decoder's own code.
        assert (calls.runs, calls.single) == ((2 * 3, 0) if name == "qwen3_moe" else (0, 2 * 3))
    monkeypatch.setenv("OFFMOE_CPU_KERNELS", "off")
    with open_tiny(folder, compile="off", prefetch="off", experts=24) as engine:
        wanted = torch.cat([logits(engine, NUM_NEW), logits(engine, NUM_NEW)])
    assert (rows - wanted).abs().max() < 1e-5 * wanted.abs().max()
