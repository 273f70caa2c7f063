"""Tensors that no parameter takes: the known needless ones are left out and counted, any other is an error by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import PROMPT, open_tiny, plain_model, save_tiny
from makers import one_line
from safetensors.torch import load_file, save_file

from offmoe.core.errors import CheckpointError
from offmoe.planner.model_facts import read_facts

IDS = torch.tensor([PROMPT])


def add(folder: Path, **tensors: torch.Tensor) -> None:
    """Tensors by name, with `__` for dots, beside those of a tiny model."""
    path = folder / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(path) | named, path, metadata={"format": "pt"})


NEEDLESS = {
    "rotary tables": {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(8)},
    "heads that guess tokens ahead": {"mtp__layers__0__mlp__up_proj__weight": torch.ones(4, 4)},
    "scales of a quantised KV cache": {"model__layers__1__self_attn__k_proj__k_scale": torch.ones(1)},
    "layers beyond num_hidden_layers": {
        "model__layers__3__self_attn__q_proj__weight": torch.ones(4, 4),
        "model__layers__3__mlp__experts__0__up_proj__weight": torch.ones(20, 48),
    },
    "the image encoder": {"visual__blocks__0__attn__qkv__weight": torch.ones(12, 4)},
}


@pytest.mark.parametrize("kind", NEEDLESS)
def test_what_is_not_needed_is_counted_in_a_note(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    with torch.inference_mode():
        expected = plain_model(folder)(IDS).logits
    size = read_facts(folder, direct=False).sizes.resident_bytes
    add(folder, **NEEDLESS[kind])
    with open_tiny(folder) as engine, torch.inference_mode():
        torch.testing.assert_close(engine.model(IDS).logits, expected, rtol=2e-5, atol=2e-5)
        (note,) = [note for note in engine.stats()["notes"] if "not needed for text" in note]
    assert f"{len(NEEDLESS[kind])} tensors (" in note and note.endswith(f": {len(NEEDLESS[kind])} of {kind}"), note
    assert read_facts(folder, direct=False).sizes.resident_bytes == size, "nor does the plan count it"


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("model.layers.1.self_attn.q_proj.bias", torch.ones(64), "attention_bias"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", torch.ones(8), "may deny them"),
        ("model.layers.1.self_attn.q_proj.weight_scale_inv", torch.ones(1, 1), "quantised in a way"),
        ("model.layers.1.self_attn.sinks", torch.ones(4), "of different models"),
        ("model.layers.1.mlp.experts.7.extra_proj.weight", torch.ones(4, 4), "of different models"),
    ],
)
def test_any_other_is_an_error_that_names_it(name: str, tensor: torch.Tensor, said: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    add(folder, **{name: tensor})
    with pytest.raises(CheckpointError) as caught:
        open_tiny(folder)
    message = one_line(caught)
    assert f"no place for 1 of the checkpoint's 81 tensors, first {name!r}" in message and said in message, message


def test_codes_are_not_read_as_values(tmp_path: Path) -> None:
    """fp8 weights whose scales and config are missing: loaded as they are, the model had another next id."""
    folder = save_tiny(tmp_path)
    path, name = folder / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        open_tiny(folder)
    assert f"tensor {name!r} is stored as F8_E4M3" in one_line(caught)
