"""Grok-1 in the files of its Hugging Face conversion, against a NumPy reference of the published architecture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import load
from grok1_reference import grok1_logits
from makers import Measured
from quant_makers import Scheme, decompressed_tensors
from safetensors.torch import save_file

import offmoe
from offmoe.hf.grok1.configuration import Grok1Config
from offmoe.planner.inspect import inspect_checkpoint
from offmoe.quantize.write import QuantiseOptions, quantise
from offmoe.tiers.device import SimulatedDevice

# Four heads over two; logits reach beyond the cap of 30, and the constants are the published ones.
CONFIG: dict[str, Any] = {
    "model_type": "grok-1",
    "architectures": ["Grok1ModelForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_grok1.Grok1ModelForCausalLM"},
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "attn_output_multiplier": 1.5,
    "embedding_multiplier_scale": 78.38367176906169,
    "output_multiplier_scale": 0.5773502691896257,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}


def make_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> dict[str, torch.Tensor]:
    """Random weights under the conversion's names; `changes` to the config."""
    generator = torch.Generator().manual_seed(3)
    config = CONFIG | changes
    width, inner = config["hidden_size"], config["intermediate_size"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def scale() -> torch.Tensor:
        return 1 + 0.1 * torch.randn(width, generator=generator)

    tensors = {"model.embed_tokens.weight": matrix(96, width), "model.norm.scale": scale()}
    for idx in range(3):
        layer = f"model.layers.{idx}"
        for name, rows in (("q_proj", width), ("k_proj", width // 2), ("v_proj", width // 2), ("o_proj", width)):
            tensors[f"{layer}.attn.{name}.weight"] = 2 * matrix(rows, width)
        for name in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
            tensors[f"{layer}.{name}.scale"] = scale()
        tensors[f"{layer}.moe_block.gate.weight"] = matrix(8, width)
        for expert in range(8):
            for name, shape in (("linear", (inner, width)), ("linear_v", (inner, width)), ("linear_1", (width, inner))):
                tensors[f"{layer}.moe_block.experts.{expert}.{name}.weight"] = matrix(*shape)
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    return tensors


def test_logits_equal_the_numpy_reference(tmp_path: Path, measured: Measured) -> None:
    tensors = {key: t.numpy().astype(np.float64) for key, t in make_checkpoint(tmp_path).items()}
    ids = torch.randint(3, 96, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = grok1_logits(ids, tensors, CONFIG)
    greedy = list(ids)
    for _ in range(12):
        greedy.append(int(grok1_logits(greedy, tensors, CONFIG)[-1].argmax()))
    with offmoe.load(str(tmp_path), ram="4GiB", expert_slots=6) as engine:
        with torch.no_grad():
            got = engine.model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
        measured("grok-1", "published", torch.from_numpy(got), torch.from_numpy(expected))
        reply = engine.generate(ids, max_new_tokens=12, temperature=0, ignore_eos=True)
        assert ids + list(reply.token_ids) == greedy
        again = engine.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert again[0].tolist() == greedy
        assert engine.stats()["misses"] > 0
        found = inspect_checkpoint(tmp_path)
        assert found.experts_total_bytes == engine._parts.experts.num_bytes
        assert (found.num_moe_layers, found.experts_per_layer, found.top_k) == (3, 8, 2)


IDS = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(1))


def logits_of(engine: offmoe.Engine) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = engine.model(input_ids=IDS).logits[0].double().numpy()
    return logits


def reference(tensors: dict[str, torch.Tensor], config: dict[str, Any] = CONFIG) -> np.ndarray[Any, Any]:
    return grok1_logits(IDS[0].tolist(), {key: t.double().numpy() for key, t in tensors.items()}, config)


@pytest.mark.parametrize("miss", ["stream", "cpu"])
def test_on_a_device(miss: str, tmp_path: Path, measured: Measured) -> None:
    expected = reference(make_checkpoint(tmp_path))
    with load(tmp_path, ram="4GiB", expert_slots=6, miss=miss, simulated=SimulatedDevice(1e9)) as engine:
        measured("grok-1", "device", torch.from_numpy(logits_of(engine)), torch.from_numpy(expected))
        assert engine.stats()["misses"] > 0


def test_in_bfloat16(tmp_path: Path) -> None:
    """Near to the reference of the same weights (half of the tokens: in others another expert may be chosen after
    rounding), and the cache changes no bit. Eight bits of each product are kept.
    """
    expected = reference(make_checkpoint(tmp_path, torch.bfloat16))
    with offmoe.load(tmp_path, ram="4GiB", expert_slots=6) as engine:
        got = logits_of(engine)
        with engine._parts.uncached():
            assert np.array_equal(logits_of(engine), got)
        assert engine.model.dtype == torch.bfloat16
    assert np.median(np.abs(got - expected).max(-1)) / np.abs(expected).max() < 0.03


@pytest.mark.skipif(sys.version_info < (3, 11), reason="compressed-tensors needs Python 3.11")
def test_quantised(tmp_path: Path, measured: Measured) -> None:
    widths = {"hidden_size": 64, "intermediate_size": 32}
    make_checkpoint(tmp_path / "source", **widths)
    quantise(tmp_path / "source", tmp_path / "int4", QuantiseOptions(expert_format="int4"), lambda *_: None)
    expected = reference(decompressed_tensors(tmp_path / "int4", Scheme(bits=4, group=32)), CONFIG | widths)
    with offmoe.load(tmp_path / "int4", ram="4GiB", expert_slots=6) as engine:
        measured("grok-1", "int4", torch.from_numpy(logits_of(engine)), torch.from_numpy(expected))


def test_published_numbers() -> None:
    config = Grok1Config()
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim, config.vocab_size) == (64, 6144, 128, 131072)
    assert config.attn_output_multiplier == 128**-0.5
    experts = config.num_hidden_layers * config.num_experts * 3 * config.hidden_size * config.intermediate_size
    assert 300e9 < experts < 314e9
