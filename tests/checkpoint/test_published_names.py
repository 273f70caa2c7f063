"""Configs as publishers write them: types of their own, stretched contexts, quantisers beside the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fail, last_json, succeed
from engines import PROMPT, open_tiny, plain_model, save_tiny
from makers import one_line
from small_edits import byte_tokenizer, edit_json

from offmoe.core.errors import UnsupportedModelError, UsageError

IDS = torch.tensor([PROMPT])
KIMI = {
    "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
}  # fmt: skip


def test_kimi_k2_runs_as_deepseek_v3_without_its_python_code(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "deepseek_v3")
    with torch.inference_mode():
        expected = plain_model(folder)(IDS).logits
    byte_tokenizer(folder)
    edit_json(folder / "config.json", **KIMI)
    assert last_json(succeed("inspect", folder, "--json").stdout)["model_type"] == "deepseek_v3"
    with open_tiny(folder) as engine, torch.inference_mode():
        torch.testing.assert_close(engine.model(IDS).logits, expected, rtol=2e-5, atol=2e-5)
        assert engine.generate("ab", max_new_tokens=2, ignore_eos=True).token_ids


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn_takes_as_many_tokens_as_its_factor_says(key: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10000.0}
    edit_json(folder / "config.json", rope_parameters=None, rope_theta=10000.0)
    edit_json(folder / "config.json", **{key: yarn})
    assert last_json(succeed("inspect", folder, "--json").stdout)["context_length"] == 1024
    ids = torch.arange(600)[None] % 128
    with open_tiny(folder, context_length=1024) as engine, torch.inference_mode():
        expected = plain_model(folder)(ids).logits[:, -1]
        torch.testing.assert_close(engine.model(ids, logits_to_keep=1).logits[:, -1], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="the model was made for 1024"):
        open_tiny(folder, context_length=1025)


QUANTISERS: dict[str, tuple[dict[str, Any], str]] = {
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
    "mlx twice": ({name: {"group_size": 64, "bits": 4} for name in ("quantization", "quantization_config")}, "mlx"),
    "gptq by layer": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*attn": {}}}},
        "'gptq' with rules that differ by layer (`dynamic`)",
    ),
    "exl3": ({"quantization_config": {"quant_method": "exl3"}}, "'exl3'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTISERS)
def test_quantisers_that_are_not_read_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    changes, name = QUANTISERS[kind]
    folder = save_tiny(tmp_path)
    edit_json(folder / "config.json", **changes)
    for command in ("inspect", "plan"):
        assert name in fail(command, folder)
    with pytest.raises(UnsupportedModelError) as caught:
        open_tiny(folder)
    assert name in one_line(caught)


def test_modelopt_tells_its_quantisation_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(told))
    for command in ("inspect", "plan"):
        assert "'modelopt NVFP4'" in fail(command, folder)
    with pytest.raises(UnsupportedModelError, match="'modelopt NVFP4'"):
        open_tiny(folder)
