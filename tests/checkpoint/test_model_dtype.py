"""The type that a model computes in: range for float16 GGUF files, the type of most bytes elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from damage import set_config
from engines import open_tiny
from families import build, save_layout
from gguf import GGMLQuantizationType as Type
from gguf_makers import make_model, save_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import offmoe
from offmoe.hf.internals import experts_modules
from offmoe.loader.resident import resident_bytes
from offmoe.planner.model_facts import read_facts

IDS = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(1))
ALL_F16 = dict.fromkeys(("gate", "up", "down", "dense"), Type.F16)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=IDS).logits.float()
    assert isinstance(logits, torch.Tensor)
    return logits


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def save_mixed(folder: Path, name: str, wide: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """The tiny model in `dtype`, but for tensors whose names contain `wide`, which are float32; no type in its config.

    Such a file begins with the float32 tensors: safetensors sorts them by size of an element.
    """
    folder.mkdir(exist_ok=True)
    save_layout(build(name), folder, "published")
    tensors = load_file(folder / "model.safetensors")
    narrow = {key: t if wide in key or not t.is_floating_point() else t.to(dtype) for key, t in tensors.items()}
    assert any(t.dtype == torch.float32 for t in narrow.values()), f"{wide=}"
    save_file(narrow, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_gguf_file_in_float16_has_the_range_of_llama_cpp(tmp_path: Path) -> None:
    """Residuals of 470,000: in float16 all logits were NaN and every id 0. The experts stay float16 in their slots."""
    path, model = tmp_path / "model.gguf", make_model("qwen3moe")
    with torch.no_grad():
        for _, experts in experts_modules(model):
            experts.get_parameter("down_proj").mul_(2000)
            experts.get_parameter("gate_up_proj").mul_(8)
    save_gguf(path, "qwen3moe", model, ALL_F16)
    with torch.no_grad():
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert max(state.abs().max().item() for state in states) > 65504
    wanted = model.generate(IDS, max_new_tokens=16, do_sample=False)[0, IDS.shape[1] :].tolist()
    with offmoe.load(path, ram="4GiB", expert_slots=4) as engine:
        assert torch.isfinite(logits_of(engine.model)).all()
        reply = engine.generate(IDS[0].tolist(), max_new_tokens=16, temperature=0, ignore_eos=True)
        assert list(reply.token_ids) == wanted
        assert engine._parts.experts.layers[0].bytes_per_weight == 2
        rows = engine._parts.serving.cpu_backend
        assert rows is None or not rows.reasons, "the kernels multiply float16 weights in bfloat16"
    assert read_facts(path, direct=False).item_bytes == 2


def test_float16_that_was_bfloat16_is_read_without_loss(tmp_path: Path) -> None:
    """As nearly all GGUF files in float16 were: logits are those of transformers in bfloat16."""
    path, model = tmp_path / "model.gguf", make_model("qwen3moe").bfloat16().float()
    save_gguf(path, "qwen3moe", model, ALL_F16)
    exact = logits_of(model)
    with offmoe.load(path, ram="4GiB", expert_slots=4) as engine:
        ours = relative(logits_of(engine.model), exact)
        norms = {"model.norm.weight", "model.layers.0.mlp.gate.weight"}
        for name, param in engine.model.named_parameters():
            if not param.is_meta and name not in norms:
                assert torch.equal(param.float(), model.get_parameter(name)), name
    model.save_pretrained(tmp_path / "plain")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert ours < 1.5 * relative(logits_of(half), exact) + 1e-3


@pytest.mark.parametrize("named", ["float16", None])
def test_a_published_float16_model_is_computed_as_transformers_does(named: str | None, tmp_path: Path) -> None:
    save_layout(build("qwen3_moe", dtype=torch.float16), tmp_path, "published")
    set_config(dtype=named)(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", experts_implementation="eager")
    with open_tiny(tmp_path) as engine:
        assert engine.model.dtype == theirs.dtype == torch.float16
        assert relative(logits_of(engine.model), logits_of(theirs)) < 5e-3
    set_config(dtype="bfloat16")(tmp_path)  # the way out where float16 overflows
    with open_tiny(tmp_path) as engine:
        assert engine.model.dtype == torch.bfloat16
        assert engine._parts.experts.layers[0].bytes_per_weight == 2


MIXED = {"deepseek_v3": "e_score_correction_bias", "qwen3_next": "A_log", "nemotron_h": "D", "glm4_moe": "mlp.gate"}


@pytest.mark.parametrize("name", MIXED)
def test_the_type_is_that_of_most_bytes_in_load_and_plan_alike(name: str, tmp_path: Path) -> None:
    save_mixed(tmp_path, name, MIXED[name])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, experts_implementation="eager")
    facts = read_facts(tmp_path, direct=False)
    assert facts.item_bytes == 2
    with open_tiny(tmp_path) as engine:
        assert engine.model.dtype == torch.bfloat16
        types = {key: tensor.dtype for key, tensor in theirs.state_dict().items()}
        for key, tensor in engine.model.state_dict().items():
            assert tensor.dtype == types[key], key
        assert relative(logits_of(engine.model), logits_of(theirs)) < 4e-2
        assert abs(resident_bytes(engine.model) - facts.sizes.resident_bytes) < 0.1 * facts.sizes.resident_bytes


def test_a_float32_model_with_some_bfloat16_stays_float32(tmp_path: Path) -> None:
    save_mixed(tmp_path, "qwen3_moe", "experts")
    assert read_facts(tmp_path, direct=False).item_bytes == 4
    with open_tiny(tmp_path) as engine:
        assert engine.model.dtype == torch.float32
