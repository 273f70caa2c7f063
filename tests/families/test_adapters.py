"""Families served through an adapter, and Grok-1: offloaded equals the family's own code.

As in test_families_exact: room for a quarter of the experts, logits within 1e-5 relative in float32, the same 32 greedy
ids from offmoe's loop and from the model's own `.generate()`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_families import ADAPTED, ENCODER_DECODERS, build_adapted, nllb_as_published
from families import Layout, build, save_layout
from makers import Measured
from safetensors.torch import load_file, save_file
from transformers.models.nllb_moe import modeling_nllb_moe

import offmoe
from offmoe.core.errors import UsageError
from offmoe.hf.adapters.base import AdaptedExperts
from offmoe.planner.inspect import inspect_checkpoint
from offmoe.report.verify import verify_output

NUM_PROMPT, NUM_NEW = 12, 32
DECODERS = [name for name in ADAPTED if name not in ENCODER_DECODERS]


@pytest.mark.parametrize("layout", ["published", "shards"])
@pytest.mark.parametrize("name", DECODERS)
def test_offloaded_equals_eager(name: str, layout: Layout, tmp_path: Path, measured: Measured) -> None:
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
    with offmoe.load(str(tmp_path), ram="4GiB", expert_slots=6, prefetch=prefetch) as engine:
        with torch.no_grad():
            got = engine.model(input_ids=ids).logits
        measured(name, layout, got, expected)
        reply = engine.generate(ids[0].tolist(), max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        assert list(reply.token_ids) == expected_ids
        again = engine.model.generate(ids[:1], max_new_tokens=NUM_NEW, do_sample=False)[0, NUM_PROMPT:].tolist()
        assert again == expected_ids
        totals = engine.stats()
        assert totals["misses"] > 0
        assert totals["experts_cached"] < totals["experts_total"]
        if (name, layout) != ("longcat_flash", "shards"):
            _survey_agrees(tmp_path, engine)


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many choices of an expert each experts call leaves out, because the expert is over its capacity."""
    found: list[int] = [0]
    forward = AdaptedExperts.forward

    def count(
        experts: AdaptedExperts, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        found.append(int((ids_TK >= experts.num_experts).sum()))
        return forward(experts, x_TD, ids_TK, weights_TK)

    monkeypatch.setattr(AdaptedExperts, "forward", count)
    return found


def _drop_surplus(file: Path) -> None:
    """As published: transformers also saves matrices for LongCat's experts that compute nothing."""
    tensors = load_file(file)
    kept = {key: t for key, t in tensors.items() if not re.search(r"experts\.(8|9|10|11)\.", key)}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})


def _survey_agrees(folder: Path, engine: offmoe.Engine) -> None:
    found, experts = inspect_checkpoint(folder), engine._parts.experts
    assert found.experts_total_bytes == experts.num_bytes
    assert found.num_moe_layers * found.experts_per_layer == experts.num_experts
    assert found.top_k == experts.top_k


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_equals_transformers(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dropped: list[int],
    measured: Measured,
) -> None:
    monkeypatch.setattr(modeling_nllb_moe.NllbMoeExperts, "forward", nllb_as_published)
    model = build_adapted(name)
    save_layout(model, tmp_path, "published")
    ids = torch.randint(3, 100, (2, NUM_PROMPT), generator=torch.Generator().manual_seed(1))
    targets = torch.randint(3, 100, (2, 5), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=targets).logits
    options: dict[str, Any] = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None, "num_beams": 1}
    expected_ids = model.generate(ids[:1], **options)[0, 1:].tolist()
    assert len(set(expected_ids)) > 3
    with offmoe.load(str(tmp_path), ram="4GiB", expert_slots=6) as engine:
        with torch.no_grad():
            got = engine.model(input_ids=ids, decoder_input_ids=targets).logits
        measured(name, "published", got, expected)
        assert max(dropped) > 0
        reply = engine.generate(ids[0].tolist(), max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        assert list(reply.token_ids) == expected_ids
        assert engine.model.generate(ids[:1], **options)[0, 1:].tolist() == expected_ids
        sampled = engine.generate(ids[0].tolist(), max_new_tokens=8, temperature=1.0, seed=5, ignore_eos=True)
        assert len(sampled.token_ids) == 8
        totals = engine.stats()
        assert totals["misses"] > 0
        assert totals["experts_cached"] < totals["experts_total"]
        assert inspect_checkpoint(tmp_path).experts_total_bytes == engine._parts.experts.num_bytes
        with pytest.raises(UsageError, match="holds no conversation"):
            engine.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(UsageError, match=" is an encoder-decoder model"):
        verify_output(
            lambda _: offmoe.load(str(tmp_path), ram="4GiB", expert_slots=6), lambda _: [3], 2, lambda *_: None
        )


def test_layout_of_glam(tmp_path: Path) -> None:
    """MoE in every second layer, 64 experts, two a token, none shared: no public weights, so a made checkpoint."""
    every_second = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": []}
    model = build("qwen3_moe", overrides={**every_second, "num_experts": 64})
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 100, (1, NUM_PROMPT), generator=torch.Generator().manual_seed(1))
    expected_ids = model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False)[0, NUM_PROMPT:].tolist()
    with offmoe.load(str(tmp_path), ram="4GiB", expert_slots=32) as engine:
        experts = engine._parts.experts
        assert (len(experts.layers), experts.num_experts, experts.top_k) == (2, 128, 2)
        reply = engine.generate(ids[0].tolist(), max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        assert list(reply.token_ids) == expected_ids
