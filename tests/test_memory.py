"""The budget is hard: what the operating system says the process grew by stays under `ram`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

EXPERT_BYTES = 3 * 512 * 384 * 2
NUM_EXPERTS = 4 * 64

# Runs in a fresh process: the peak is since its start, the base what `import offmoe` left.
SCRIPT = """
import json, sys
import offmoe
from offmoe.base.machine import peak_rss_bytes, rss_bytes
base = rss_bytes()
with offmoe.load(sys.argv[1], ram=sys.argv[2], context_length=1024) as engine:
    ids = [(7 * position + 3) % 8000 for position in range(512)]
    engine.generate(ids, max_new_tokens=8, temperature=0, ignore_end=True)
    print(json.dumps({"growth": peak_rss_bytes() - base, **engine.stats()}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB of experts in bfloat16."""
    folder = tmp_path_factory.mktemp("large")
    config = Qwen3MoeConfig(
        vocab_size=8000, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, intermediate_size=512, moe_intermediate_size=384, num_experts=64, num_experts_per_tok=8,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("ram_mib", [600, 700])
def test_growth_stays_under_the_budget(checkpoint: Path, ram_mib: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint), f"{ram_mib}MiB"], capture_output=True, text=True, check=True
    )
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["growth"] <= ram_mib << 20
    assert record["planned_bytes"] <= ram_mib << 20
    assert record["experts_cached"] < NUM_EXPERTS
    assert record["misses"] > 0
    # A read brings one expert, never a layer: no more bytes than misses times an expert and its alignment, beside what
    # was read ahead.
    assert record["disk_bytes"] <= record["misses"] * (EXPERT_BYTES + 2 * 4096) + record["ahead_bytes"]
