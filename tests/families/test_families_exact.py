"""Exactness: every family, in every layout in which checkpoints occur, against transformers eager.

Loaded with room for a quarter of the experts: logits within 1e-5 relative in float32, and the same 32 greedy ids with
KV cache from offmoe's own loop, the first 12 from the model's `.generate()` too. Each layout is served in another way,
so that every family goes through fetches ahead of time, a (simulated) device, and misses computed beside it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import load
from families import FAMILIES, LAYOUTS, MULTIMODAL, Layout, build, save_layout
from makers import Measured

import offmoe
from offmoe.hf.internals import experts_modules
from offmoe.planner.inspect import inspect_checkpoint
from offmoe.tiers.device import SimulatedDevice

NUM_PROMPT, NUM_NEW = 12, 32
NUM_AGAIN = 12  # by the model's own generate, whose steps are the same


def serving(name: str, layout: Layout) -> dict[str, Any]:
    """Options of `load`: RAM with lookahead, a device whose misses are copied or computed in RAM, RAM alone."""
    if layout == "published":
        return {"prefetch": 1}
    if layout == "stacked":
        return {"prefetch": 1, "miss": "cpu" if len(name) % 2 else "stream", "simulated": SimulatedDevice(1e9)}
    return {"prefetch": "off"}


CASES: list[tuple[str, Layout]] = [(name, layout) for name in FAMILIES for layout in LAYOUTS] + [
    (name, "published") for name in MULTIMODAL
]


@functools.lru_cache(maxsize=1)
def eager(name: str) -> tuple[Any, torch.Tensor, torch.Tensor, list[int]]:
    """transformers' model, ids (2, T), its logits for them (2, T, V) and its greedy ids after the first row."""
    model = build(name)
    ids = torch.randint(3, 100, (2, NUM_PROMPT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    reply = model.generate(ids[:1], max_new_tokens=NUM_NEW, do_sample=False)[0, NUM_PROMPT:].tolist()
    return model, ids, expected, reply


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_offloaded_equals_eager(name: str, layout: Layout, tmp_path: Path, measured: Measured) -> None:
    model, ids, expected, expected_ids = eager(name)
    save_layout(model, tmp_path, layout)
    num_experts = sum(len(module.get_parameter("down_proj")) for _, module in experts_modules(model))

    slots = max(_top_k(model), num_experts // 4)
    with load(str(tmp_path), ram="4GiB", expert_slots=slots, **serving(name, layout)) as engine:
        with torch.no_grad():
            got = engine.model(input_ids=ids).logits
        measured(name, layout, got, expected)
        reply = engine.generate(ids[0].tolist(), max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        assert list(reply.token_ids) == expected_ids
        again = engine.model.generate(ids[:1], max_new_tokens=NUM_AGAIN, do_sample=False)[0, NUM_PROMPT:].tolist()
        assert again == expected_ids[:NUM_AGAIN]
        totals = engine.stats()
        assert totals["misses"] > 0
        assert totals["experts_cached"] < totals["experts_total"] == num_experts
        _survey_agrees(tmp_path, engine)


def _top_k(model: torch.nn.Module) -> int:
    """A cache below top-k is refused; families' own configs say what top-k is, 4 covers the tiny ones."""
    config: Any = model.config
    names = ("num_experts_per_tok", "top_k_experts")
    return max((getattr(config.get_text_config(), name, None) or 0 for name in names), default=0) or 4


def _survey_agrees(folder: Path, engine: offmoe.Engine) -> None:
    """What `inspect` says from headers alone is what the loader found through transformers."""
    found, experts = inspect_checkpoint(folder), engine._parts.experts
    assert found.experts_total_bytes == experts.num_bytes
    assert found.num_moe_layers * found.experts_per_layer >= experts.num_experts
    assert found.total_bytes == engine._parts.index.num_bytes
