"""The budget is hard: what the operating system says the process grew by stays under `ram`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from benchlib.gguf_writer import convert
from quant_makers import save_mxfp4
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EXPERT_BYTES = 3 * 512 * 384 * 2
NUM_EXPERTS = 4 * 64

# Runs in a fresh process: the peak is since its start, the base what `import offmoe` left.
SCRIPT = """
import json, sys
import offmoe
from offmoe.machine.memory import peak_rss_bytes, rss_bytes
base = rss_bytes()
with offmoe.load(sys.argv[1], ram=sys.argv[2], context_length=2 * int(sys.argv[3])) as engine:
    ids = [(7 * position + 3) % 8000 for position in range(int(sys.argv[3]))]
    engine.generate(ids, max_new_tokens=8, temperature=0, ignore_eos=True)
    print(json.dumps({"growth": peak_rss_bytes() - base, "prefill_chunk": engine.plan.prefill_chunk, **engine.stats()}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB of experts in bfloat16."""
    folder = tmp_path_factory.mktemp("large")
    config = Qwen3MoeConfig(
        vocab_size=8000, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, intermediate_size=512, moe_intermediate_size=384, num_experts=64, num_experts_per_tok=8,
        norm_topk_prob=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latent_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V2-Lite's attention: what it would write for 3,200 tokens of context is 130 MB."""
    folder = tmp_path_factory.mktemp("latent")
    config = DeepseekV3Config(
        vocab_size=8000, hidden_size=512, num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=16,
        kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, head_dim=64,
        intermediate_size=512, moe_intermediate_size=384, n_routed_experts=64, num_experts_per_tok=8, n_group=1,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@cache
def larger_libraries_mib() -> int:
    """MiB that libraries take here beyond the 405 that these budgets are made for: torch with CUDA has more."""
    look = "import psutil, torch, transformers; from transformers.models.qwen3_moe import modeling_qwen3_moe"
    command = [sys.executable, "-c", f"{look}; print(psutil.Process().memory_info().rss >> 20)"]
    return max(0, int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) - 405)


def grow(checkpoint: Path, ram_mib: int, num_tokens: int) -> dict[str, int]:
    """What a process says of itself that read a prompt of `num_tokens`, half of its context, and wrote some."""
    ram_mib += larger_libraries_mib()
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), f"{ram_mib}MiB", str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert record["growth"] <= ram_mib << 20
    assert record["planned_bytes"] <= ram_mib << 20
    return record


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("ram_mib", [600, 700])
def test_growth_stays_under_the_budget(checkpoint: Path, ram_mib: int) -> None:
    record = grow(checkpoint, ram_mib, 512)
    assert record["experts_cached"] < NUM_EXPERTS
    assert record["misses"] > 0
    # A read brings one expert, never a layer: no more bytes than misses times an expert and its alignment, beside what
    # was read ahead.
    assert record["disk_bytes"] <= record["misses"] * (EXPERT_BYTES + 2 * 4096) + record["ahead_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_growth_with_latent_attention(latent_checkpoint: Path) -> None:
    record = grow(latent_checkpoint, 660, 1600)
    assert record["misses"] > 0


def as_int8(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """compressed-tensors' int-quantized: a scale a row."""
    scale_N1 = tensor.float().abs().amax(1, keepdim=True) / 127
    return {"weight": (tensor.float() / scale_N1).round().to(torch.int8), "weight_scale": scale_N1.bfloat16()}


def as_fp8(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """DeepSeek-V3's: e4m3 and a scale for 128 x 128."""
    blocks = tensor.float().view(tensor.shape[0] // 128, 128, tensor.shape[1] // 128, 128)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    codes = (blocks / scales).view(tensor.shape).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales[:, 0, :, 0].contiguous()}


ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FORMS: dict[str, tuple[Callable[[torch.Tensor], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "int8": (
        as_int8,
        {
            "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": ROWS, "format": "int-quantized"}},
        },
    ),
    "fp8": (as_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
}  # fmt: skip


def save_published(form: str, checkpoint: Path, folder: Path) -> None:
    """The checkpoint with its experts in a form that others publish, tensor by tensor."""
    encode, quantisation = FORMS[form]
    tensors = {}
    for key, tensor in load_file(checkpoint / "model.safetensors").items():
        if ".experts." not in key:
            tensors[key] = tensor
            continue
        tensors |= {f"{key.removesuffix('weight')}{leaf}": value for leaf, value in encode(tensor).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("form", [*FORMS, "int4", "mxfp4", "gguf"])
def test_quantised_experts_are_never_unpacked_whole(form: str, checkpoint: Path, tmp_path: Path) -> None:
    """All experts fit as they are stored, in a budget with too little room for all of them in bfloat16."""
    source = tmp_path / ("model.gguf" if form == "gguf" else "model")
    if form == "gguf":
        convert(checkpoint, source, type_name="q4_0")
    elif form == "int4":
        command = [sys.executable, "-m", "offmoe", "quantize", str(checkpoint), str(source), "--expert-format", "int4"]
        subprocess.run(command, capture_output=True, check=True)
    elif form == "mxfp4":
        source.mkdir()
        sizes: dict[str, Any] = {
            "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 64,
            "num_local_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 1024,
            "layer_types": ["full_attention"] * 4,
        }  # fmt: skip
        save_mxfp4(source, dtype=torch.bfloat16, **sizes)
    else:
        source.mkdir()
        save_published(form, checkpoint, source)
    record = grow(source, 740, 512)
    assert record["experts_cached"] == NUM_EXPERTS


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_growth_with_sinks(tmp_path: Path) -> None:
    """Written out, the scores of a piece of the prompt would be 50 MB: of 128 tokens for 3,200, in 16 heads."""
    config = GptOssConfig(
        vocab_size=8000, hidden_size=512, num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=4,
        head_dim=64, intermediate_size=384, num_local_experts=64, num_experts_per_tok=8, sliding_window=128,
        max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    record = grow(tmp_path, 660, 1600)
    assert record["misses"] > 0
    assert record["prefill_chunk"] > 64
