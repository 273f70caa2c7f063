"""Keys and tensors of GGUF files that change numbers: applied, with transformers' values, or refused by their names."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import build
from gguf_makers import WIDTHS, make_model, save_gguf
from makers import one_line

import offmoe
from offmoe.checkpoint.index import read_config
from offmoe.core.errors import CheckpointError, UnsupportedModelError

FAR = 999
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip


def llama3_factors(rope: dict[str, Any], head: int) -> list[float]:
    """`rope_freqs` as llama.cpp's converter computes them (generate_extra_tensors of its Llama class)."""
    found = []
    for exponent in torch.arange(0, head, 2, dtype=torch.float32) / head:
        length = 2 * math.pi * rope["rope_theta"] ** float(exponent)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] / length
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return found


def logits_far_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setattr("offmoe.loader.build._gguf_dtype", lambda index: torch.float32, raising=False)
    with offmoe.load(path, ram="4GiB", expert_slots=8) as engine, torch.no_grad():
        return engine.model(input_ids=ids(), position_ids=positions()).logits


def ids() -> torch.Tensor:
    return torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(1))


def positions() -> torch.Tensor:
    return torch.arange(FAR - 11, FAR + 1)[None]


def mixtral(rope: dict[str, Any]) -> Any:
    return build(
        "mixtral", overrides=WIDTHS | {"head_dim": 64, "max_position_embeddings": 1024, "rope_parameters": rope}
    )


def writes_factors(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.array(llama3_factors(LLAMA3, 64), dtype=np.float32))


SHORT, LONG = [1.0 + 0.02 * i for i in range(32)], [1.5 + 0.1 * i for i in range(32)]


def writes_longrope(writer: gguf.GGUFWriter) -> None:
    for name, factors in (("short", SHORT), ("long", LONG)):
        writer.add_tensor(f"rope_factors_{name}.weight", np.array(factors, dtype=np.float32))
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(512)
    writer.add_rope_scaling_attn_factors(1.2)


SCALED: dict[str, tuple[dict[str, Any], Callable[[gguf.GGUFWriter], None]]] = {
    "rope_freqs": (LLAMA3, writes_factors),
    "linear, by the old key": (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0),
    ),
    "linear, without a type": (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        lambda writer: writer.add_rope_scaling_factor(4.0),
    ),
    "a factor that type none forbids": (
        {"rope_type": "default", "rope_theta": 10000.0},
        lambda writer: (
            writer.add_rope_scaling_type(gguf.RopeScalingType.NONE), writer.add_rope_scaling_factor(4.0)
        ),
    ),
    "attn_factor": (
        {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 32, "long_factor": [1.0] * 32,
            "attention_factor": 1.25, "original_max_position_embeddings": 1024,
        },
        lambda writer: writer.add_rope_scaling_attn_factors(1.25),
    ),
    "longrope": (
        {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": SHORT, "long_factor": LONG,
            "attention_factor": 1.2, "original_max_position_embeddings": 512,
        },
        writes_longrope,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALED)
def test_scaled_positions_give_the_logits_of_transformers(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope, more = SCALED[case]
    expected, path = mixtral(rope), tmp_path / "model.gguf"
    save_gguf(path, "llama", expected, {}, more=more)
    with torch.no_grad():
        wanted = expected(input_ids=ids(), position_ids=positions()).logits
    got = logits_far_out(path, monkeypatch)
    assert torch.allclose(got, wanted, atol=1e-4, rtol=0), float((got - wanted).abs().max())
    if case != "a factor that type none forbids":
        plain = mixtral({"rope_type": "default", "rope_theta": 10000.0})
        plain.load_state_dict(expected.state_dict())
        with torch.no_grad():
            unscaled = plain(input_ids=ids(), position_ids=positions()).logits
        assert float((wanted - unscaled).abs().max()) > 0.01, "the scaling shows"


CHANGES: dict[str, Callable[[gguf.GGUFWriter], object]] = {
    "attention.temperature_scale": lambda writer: writer.add_attn_temperature_scale(0.1),
    "attention.scale": lambda writer: writer.add_attention_scale(0.02),
    "logit_scale": lambda writer: writer.add_logit_scale(0.5),
    "embedding_scale": lambda writer: writer.add_embedding_scale(12.0),
    "final_logit_softcapping": lambda writer: writer.add_final_logit_softcapping(30.0),
    "expert_gating_func": lambda writer: writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID),
    "expert_weights_norm": lambda writer: writer.add_expert_weights_norm(False),
    "expert_weights_scale": lambda writer: writer.add_expert_weights_scale(2.5),
    "expert_group_count": lambda writer: writer.add_expert_group_count(4),
    "rope.dimension_count": lambda writer: writer.add_rope_dimension_count(8),
    "attention.causal": lambda writer: writer.add_causal_attention(False),
    "attention.of_tomorrow": lambda writer: writer.add_uint32("qwen3moe.attention.of_tomorrow", 7),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_that_changes_numbers_is_refused_by_its_name(key: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(path, "qwen3moe", make_model("qwen3moe"), {}, more=CHANGES[key])
    with pytest.raises(UnsupportedModelError) as caught:
        read_config(path)
    line = one_line(caught)
    assert f"qwen3moe.{key} " in line
    assert "is not read yet" in line


def test_harmless_keys_and_usual_values_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_vocab_size(128)
        writer.add_value_length(16)
        writer.add_rope_dimension_count(16)
        writer.add_expert_weights_norm(True)
        writer.add_expert_weights_scale(1.0)
        writer.add_causal_attention(True)
        writer.add_expert_feed_forward_length(20)
        writer.add_uint32("general.of_tomorrow", 7)

    save_gguf(path, "qwen3moe", make_model("qwen3moe"), {}, more=more)
    assert read_config(path)["model_type"] == "qwen3_moe"


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "blk.0.attn_q.scale", "blk.0.attn_post_norm.weight", "cls.weight"]
)
def test_a_tensor_that_is_not_known_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(
        path,
        "qwen3moe",
        make_model("qwen3moe"),
        {},
        more=lambda writer: writer.add_tensor(name, np.ones(64, np.float32)),
    )
    with pytest.raises(UnsupportedModelError) as caught:
        offmoe.load(path, ram="4GiB")
    assert f"has a tensor {name!r}" in one_line(caught)


def test_factors_of_another_length_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(
        path, "llama", make_model("llama"), {},
        more=lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(5, np.float32)),
    )  # fmt: skip
    with pytest.raises((UnsupportedModelError, CheckpointError), match="5 factors of frequencies"):
        read_config(path)
