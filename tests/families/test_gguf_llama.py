"""The same GGUF file in offmoe and in llama.cpp: the same greedy ids. Needs an interpreter with llama-cpp-python: its
own, or the one that OFFMOE_LLAMA_PYTHON names.

offmoe computes in float32 here. llama.cpp rounds what goes into quantised products to 8 bits, so there the ids may
differ where the logits of both are as near to each other as that.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_makers import save_gguf
from places import SCRIPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

import offmoe
from offmoe.checkpoint.locate import demo_model_folder

PEER = SCRIPTS / "benchlib" / "peer_llama.py"
NUM_NEW = 32
# Of logits between -20 and 20; a tenth of it is what the rounding does to most.
NEAR = 0.5
PROMPT = "import os"


def llama_python() -> str:
    named = os.environ.get("OFFMOE_LLAMA_PYTHON")
    if named is None and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    return named or sys.executable


@pytest.mark.parametrize("kind", [Type.F16, Type.Q8_0, Type.Q4_0, Type.MXFP4])
def test_greedy_ids_are_those_of_llama_cpp(kind: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmoe.loader.build._gguf_dtype", lambda index: torch.float32)
    python, path = llama_python(), tmp_path / "model.gguf"
    model = AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float32)
    save_gguf(
        path, "qwen3moe", model, dict.fromkeys(("gate", "up", "down", "dense"), kind), tokenizer=demo_model_folder()
    )
    prompt: list[int] = AutoTokenizer.from_pretrained(demo_model_folder())(PROMPT)["input_ids"]
    with offmoe.load(path, ram="2GiB", expert_slots=40) as engine:
        reply = engine.generate(prompt, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([[*prompt, *reply.token_ids]])).logits[0, len(prompt) - 1 :]
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([*prompt, *reply.token_ids]))
    command = [python, str(PEER), str(path), "--ids", str(ids), "--prefill", str(len(prompt))]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--decode", str(NUM_NEW - 1)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])["next_ids"]
    assert len(theirs) == NUM_NEW
    other = [step for step, token_id in enumerate(reply.token_ids) if theirs[step] != token_id]
    assert len(other) <= (0 if kind is Type.F16 else 3), f"{other=}"
    gaps = [round(float(logits[step].max() - logits[step, theirs[step]]), 2) for step in other]
    assert max(gaps, default=0.0) < NEAR, f"{gaps=} {other=}"
