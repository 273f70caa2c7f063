"""Families served through an adapter, and Grok-1: offloaded equals the family's own code.

As in test_families_exact: room for a quarter of the experts, logits within 1e-5 relative in float32, the same 32 greedy
ids from offmoe's loop and from the model's own `.generate()`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from adapted_families import ADAPTED, ENCODER_DECODERS, build_adapted
from families import Layout, save_layout
from safetensors.torch import load_file, save_file

import offmoe
from offmoe.planner.survey import survey

NUM_PROMPT, NUM_NEW = 12, 32
DECODERS = [name for name in ADAPTED if name not in ENCODER_DECODERS]


@pytest.mark.parametrize("layout", ["published", "shards"])
@pytest.mark.parametrize("name", DECODERS)
def test_offloaded_equals_eager(name: str, layout: Layout, tmp_path: Path) -> None:
    model = build_adapted(name)
    save_layout(model, tmp_path, layout)
    if name == "longcat_flash" and layout == "published":
        _drop_surplus(tmp_path / "model.safetensors")
    ids = torch.randint(3, 100, (2, NUM_PROMPT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    expected_ids = model.generate(ids[:1], max_new_tokens=NUM_NEW, do_sample=False)[0, NUM_PROMPT:].tolist()
    assert len(set(expected_ids)) > 3
    prefetch = 1 if layout == "published" else "off"
    with offmoe.load(str(tmp_path), ram="4GiB", experts=6, prefetch=prefetch) as engine:
        with torch.no_grad():
            got = engine.model(input_ids=ids).logits
        assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
        reply = engine.generate(ids[0].tolist(), max_new_tokens=NUM_NEW, temperature=0, ignore_end=True)
        assert list(reply.token_ids) == expected_ids
        again = engine.model.generate(ids[:1], max_new_tokens=NUM_NEW, do_sample=False)[0, NUM_PROMPT:].tolist()
        assert again == expected_ids
        totals = engine.stats()
        assert totals["misses"] > 0
        assert totals["experts_cached"] < totals["experts_total"]
        if (name, layout) != ("longcat_flash", "shards"):
            _survey_agrees(tmp_path, engine)


def _drop_surplus(file: Path) -> None:
    """As published: transformers also saves matrices for LongCat's experts that compute nothing."""
    tensors = load_file(file)
    kept = {key: t for key, t in tensors.items() if not re.search(r"experts\.(8|9|10|11)\.", key)}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})


def _survey_agrees(folder: Path, engine: offmoe.Engine) -> None:
    found, experts = survey(folder), engine._parts.experts
    assert found.experts_total_bytes == experts.num_bytes
    assert found.num_moe_layers * found.experts_per_layer == experts.num_experts
    assert found.top_k == experts.top_k
