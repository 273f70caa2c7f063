"""Checkpoints described from config and headers alone, in folders made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import succeed
from engines import save_tiny
from makers import one_line, write_shards
from safetensors.torch import load_file, save_file

from offmoe.core.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from offmoe.planner.inspect import Inspection, inspect_checkpoint
from offmoe.planner.model_facts import read_facts

CONFIG: dict[str, Any] = {
    "model_type": "tinymoe", "architectures": ["TinyMoeForCausalLM"], "num_hidden_layers": 3, "num_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 512,
}  # fmt: skip
# Two MoE layers of four experts of 3 x 6 x 8; all else stays resident.
EXPERT_ELEMENTS = 3 * 6 * 8
RESIDENT = {
    "model.embed_tokens.weight": torch.zeros(32, 8, dtype=torch.bfloat16),
    "model.layers.0.mlp.gate_proj.weight": torch.zeros(6, 8, dtype=torch.bfloat16),
    "model.layers.1.mlp.gate.weight": torch.zeros(4, 8),
    "model.layers.1.mlp.shared_expert.up_proj.weight": torch.zeros(6, 8, dtype=torch.bfloat16),
    "model.layers.1.conv1d.weight": torch.zeros(4, 1, 3, dtype=torch.bfloat16),
}
RESIDENT_BYTES = sum(tensor.nbytes for tensor in RESIDENT.values())
PER_EXPERT = {
    f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight": torch.zeros(shape, dtype=torch.bfloat16)
    for layer in (1, 2)
    for expert in range(4)
    for name, shape in (("gate", (6, 8)), ("up", (6, 8)), ("down", (8, 6)))
}
STACKED = {
    f"model.layers.{layer}.mlp.experts.{name}": torch.zeros(shape, dtype=torch.bfloat16)
    for layer in (1, 2)
    for name, shape in (("gate_up_proj", (4, 12, 8)), ("down_proj", (4, 8, 6)))
}


def make(folder: Path, tensors: dict[str, torch.Tensor], **changed: Any) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | changed))
    return folder


@pytest.mark.parametrize(
    ("experts", "layout"),
    [(PER_EXPERT, "one tensor per expert"), (STACKED, "stacked tensors")],
    ids=["single", "stacked"],
)
def test_the_same_model_in_two_layouts(experts: dict[str, torch.Tensor], layout: str, tmp_path: Path) -> None:
    found = inspect_checkpoint(make(tmp_path, RESIDENT | experts))
    expert_bytes = EXPERT_ELEMENTS * 2
    assert found == Inspection(
        model_type="tinymoe", architecture="TinyMoeForCausalLM", num_layers=3, num_moe_layers=2, experts_per_layer=4,
        top_k=2, expert_bytes=expert_bytes, experts_total_bytes=8 * expert_bytes, resident_bytes=RESIDENT_BYTES,
        unused_bytes=0, total_bytes=RESIDENT_BYTES + 8 * expert_bytes, layout=layout,
        formats={"BF16": RESIDENT_BYTES - 128 + 8 * expert_bytes, "F32": 128}, num_files=1,
        num_tensors=len(RESIDENT | experts), context_length=512,
    )  # fmt: skip
    assert found.bytes_per_token == 2 * 2 * expert_bytes
    assert found.as_dict()["expert_bytes"] == expert_bytes


def test_shards_are_one_model(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    expected = inspect_checkpoint(make(whole, RESIDENT | PER_EXPERT)).as_dict()
    (parts / "config.json").write_text(json.dumps(CONFIG))
    write_shards(parts, {"a.safetensors": RESIDENT, "b.safetensors": PER_EXPERT})
    assert inspect_checkpoint(parts).as_dict() == expected | {"num_files": 2}


def test_numbers_are_found_wherever_the_config_has_them(tmp_path: Path) -> None:
    """In a text tower's own config, under the family's own name, or one a layer."""
    text = {"num_hidden_layers": 5, "n_routed_experts": [0, 4, 4], "moe_topk": [1, 3], "max_position_embeddings": 9}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "two-towers", "text_config": text}))
    save_file(RESIDENT | STACKED, tmp_path / "model.safetensors")
    found = inspect_checkpoint(tmp_path)
    assert (found.num_layers, found.experts_per_layer, found.top_k, found.context_length) == (5, 4, 3, 9)
    assert found.architecture == "unknown"


@pytest.mark.parametrize("odd", [True, 4.0, "4", None, -4, {"x": 4.0}])
def test_numbers_of_another_kind_are_no_numbers(odd: Any, tmp_path: Path) -> None:
    found = inspect_checkpoint(make(tmp_path, PER_EXPERT, num_experts_per_tok=odd, max_position_embeddings=odd))
    assert (found.top_k, found.context_length, found.bytes_per_token) == (0, None, 0)


def test_three_dimensions_alone_make_no_expert(tmp_path: Path) -> None:
    """The first size must be a number of experts that the config names."""
    with pytest.raises(UnsupportedModelError, match="dense model"):
        inspect_checkpoint(make(tmp_path, RESIDENT | STACKED, num_experts=5))


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        inspect_checkpoint(make(tmp_path, RESIDENT, model_type="llama", num_experts=None))
    message = one_line(caught)
    assert f"{tmp_path} is a dense model (llama)" in message and "transformers or llama.cpp" in message


@pytest.mark.parametrize("architectures", ["TinyMoeForCausalLM", 5, [1], {"a": 1}])
def test_architectures_are_a_list_of_names(architectures: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a list of names"):
        inspect_checkpoint(make(tmp_path, PER_EXPERT, architectures=architectures))


def test_no_architecture(tmp_path: Path) -> None:
    assert inspect_checkpoint(make(tmp_path, PER_EXPERT, architectures=[])).architecture == "unknown"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelNotFoundError, match=r"has no model\.safetensors"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 0 bytes"):
        inspect_checkpoint(tmp_path)


def test_what_is_not_loaded_is_in_no_count(tmp_path: Path) -> None:
    """DeepSeek-V3's files hold 59 layers of experts, one of them beyond its 61 layers; `plan` counted 58."""
    folder = save_tiny(tmp_path, "deepseek_v3")
    before, tensors = inspect_checkpoint(folder), load_file(folder / "model.safetensors")
    last = f"model.layers.{before.num_layers - 1}."
    beyond = {
        name.replace(last, f"model.layers.{before.num_layers}."): t.clone()
        for name, t in tensors.items()
        if last in name
    }
    assert any(".experts." in name for name in beyond)
    save_file(tensors | beyond, folder / "model.safetensors", metadata={"format": "pt"})
    found = json.loads(succeed("inspect", folder, "--json").stdout)
    for name in ("num_moe_layers", "experts_per_layer", "experts_total_bytes", "expert_bytes", "resident_bytes"):
        assert found[name] == getattr(before, name), name
    assert found["unused_bytes"] == sum(tensor.nbytes for tensor in beyond.values())
    plan = read_facts(folder, direct=False)
    assert found["num_moe_layers"] == plan.num_moe_layers and found["unused_bytes"] == plan.unused_bytes
    assert found["experts_total_bytes"] == plan.experts_total_bytes
    assert (found["resident_bytes"], found["total_bytes"]) == (plan.resident_disk_bytes, plan.total_bytes)
