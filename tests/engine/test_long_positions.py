"""Rotary positions that depend on the length of the text: ids are those of transformers' own `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import open_tiny, plain_model
from families import build, save_layout
from small_edits import edit_json
from transformers import PreTrainedModel

TRAINED, NUM_NEW = 32, 8
PROMPT = [(7 * i + 3) % 128 for i in range(60)]
_FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [2.0 + 0.5 * i for i in range(6)]}
_WIDER = {name: [factors[0]] * 2 + factors for name, factors in _FACTORS.items()}
# Of the models themselves (a config of Phi-3.5-MoE's form is written over theirs), then what transformers does.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": ("phimoe", {"rope_type": "longrope", **_FACTORS, "short_mscale": 1.1, "long_mscale": 1.6}),
    "longrope": ("qwen3_moe", {"rope_type": "longrope", **_WIDER, "factor": 8.0}),
}


def _save(folder: Path, kind: str) -> Path:
    name, rope = KINDS[kind]
    original = {"original_max_position_embeddings": TRAINED}
    rope = rope | original | {"rope_theta": 10000.0}
    save_layout(build(name, overrides={"rope_parameters": rope}), folder, "published")
    if kind == "phimoe":  # as published
        published = {"type": rope.pop("rope_type")} | {key: rope[key] for key in rope if key != "rope_theta"}
        edit_json(folder / "config.json", rope_parameters=None, rope_scaling=published, rope_theta=10000.0, **original)
    return folder


def _expected(model: PreTrainedModel, prompt: list[int]) -> tuple[int, ...]:
    replies = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False)
    return tuple(replies[0, len(prompt) :].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_ids_on_both_sides_of_the_trained_length(kind: str, tmp_path: Path) -> None:
    folder = _save(tmp_path, kind)
    lengths = (5, TRAINED - 3, TRAINED, TRAINED + 1, len(PROMPT), TRAINED - 2)  # the second and the last grow past it
    plain = plain_model(folder)
    expected = [_expected(plain, PROMPT[:length]) for length in lengths]
    with open_tiny(folder, context_length=128, prefill_chunk=8) as engine:
        for length, ids in zip(lengths, expected, strict=True):
            assert engine.generate(PROMPT[:length], max_new_tokens=NUM_NEW, ignore_eos=True).token_ids == ids, length
        whole = torch.tensor([PROMPT])
        with torch.inference_mode():
            torch.testing.assert_close(engine.model(whole).logits, plain(whole).logits, rtol=1e-4, atol=1e-4)


def test_states_of_a_long_text_serve_no_short_one(tmp_path: Path) -> None:
    folder = _save(tmp_path, "phimoe")
    with open_tiny(folder, context_length=128) as engine:
        reply = engine.generate(PROMPT[:29], max_new_tokens=NUM_NEW, ignore_eos=True).token_ids
        shorter = [*PROMPT[:29], *reply[:2]]
        found = engine.generate(shorter, max_new_tokens=NUM_NEW, ignore_eos=True, reuse=True).token_ids
    assert found == _expected(plain_model(folder), shorter)
