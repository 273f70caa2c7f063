"""GGUF files that the gguf package wrote: logits and ids of the transformers model with the same values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_makers import MODELS, make_model, save_gguf

import offmoe
from offmoe.planner.survey import survey

NUM_PROMPT, NUM_NEW = 12, 24
Q4_K_M = {"gate": Type.Q4_K, "up": Type.Q4_K, "down": Type.Q6_K, "dense": Type.Q8_0}
ALL_Q8 = dict.fromkeys(("gate", "up", "down", "dense"), Type.Q8_0)
CASES: dict[str, tuple[str, dict[str, Type]]] = {
    **{f"{name}, q8_0": (name, ALL_Q8) for name in MODELS},
    "qwen3moe, f32": ("qwen3moe", {}),
    "qwen3moe, f16 experts": ("qwen3moe", dict.fromkeys(("gate", "up", "down"), Type.F16)),
    "qwen3moe, q4_0": ("qwen3moe", dict.fromkeys(("gate", "up", "down", "dense"), Type.Q4_0)),
    "qwen3moe, q4_k and q6_k": ("qwen3moe", Q4_K_M),
    "llama, q5_k": ("llama", {"gate": Type.Q5_K, "up": Type.Q5_K, "down": Type.Q6_K, "dense": Type.Q5_0}),
    "olmoe, q2_k and q3_k": ("olmoe", {"gate": Type.Q2_K, "up": Type.Q2_K, "down": Type.Q3_K, "dense": Type.Q4_1}),
    "gpt-oss, mxfp4": ("gpt-oss", dict.fromkeys(("gate", "up", "down"), Type.MXFP4)),
    "gpt-oss, f32": ("gpt-oss", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_and_ids_are_those_of_the_same_values(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offmoe.models.build._gguf_dtype", lambda index: torch.float32)
    name, kinds = CASES[case]
    expected, path = make_model(name), tmp_path / "model.gguf"
    save_gguf(path, name, expected, kinds)
    ids = torch.randint(3, 100, (2, NUM_PROMPT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = expected(input_ids=ids).logits
    wanted_ids = expected.generate(ids[:1], max_new_tokens=NUM_NEW, do_sample=False)[0, NUM_PROMPT:].tolist()
    with offmoe.load(path, ram="4GiB", experts=4) as engine:
        with torch.no_grad():
            got = engine.model(input_ids=ids).logits
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5
        reply = engine.generate(ids[0].tolist(), max_new_tokens=NUM_NEW, temperature=0, ignore_end=True)
        assert list(reply.token_ids) == wanted_ids
        assert engine.stats()["misses"] > 0
        assert survey(path).experts_total_bytes == engine._parts.experts.num_bytes
