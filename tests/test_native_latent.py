"""Attention to latents by the CPU kernels: whose, that it gives what transformers gives, and when it stays away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_cases import needs_library
from engines import PROMPT, open_tiny, plain_model, save_tiny
from families import build, save_layout
from test_native_layers import logits, steps

import offmoe
from offmoe.models.native_latent import _KNOWN_CALLS, _ROTATES, LatentStep
from offmoe.models.native_token import calls_only

NUM_NEW = 12

pytestmark = needs_library


def calls_of(engine: offmoe.Engine, num_new: int = 4) -> int:
    """Tokens of layers whose attention the kernels computed."""
    calls, kernels = [], engine._parts.native.kernels
    kernels.run_latent = lambda address: (calls.append(address), type(kernels).run_latent(kernels, address))
    try:
        logits(engine, num_new)
    finally:
        del kernels.run_latent
    return len(calls)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"])
@pytest.mark.parametrize("query", ["compressed", "whole"])
def test_the_logits_are_transformers_own(name: str, query: str, tmp_path: Path) -> None:
    """Complex angles, neighbours that are rotated; queries of one matrix and of two."""
    save_layout(build(name, overrides={} if query == "compressed" else {"q_lora_rank": None}), tmp_path, "published")
    with open_tiny(tmp_path, compile="off", prefetch="off") as engine:
        found = steps(engine, LatentStep)
        assert len(found) == 3
        first = logits(engine, NUM_NEW)
        assert all(step.is_settled for step in found)
        again = logits(engine, NUM_NEW)
        assert torch.equal(first, again)
        assert calls_of(engine) == 3 * 3
    expected = plain_model(tmp_path).generate(
        torch.tensor([PROMPT]),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    wanted = torch.cat(expected.logits)
    assert (again - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("interleave", [False, True])
def test_which_numbers_are_rotated_together_is_found(interleave: bool, tmp_path: Path) -> None:
    save_layout(build("deepseek_v3", overrides={"rope_interleave": interleave}), tmp_path, "published")
    with open_tiny(tmp_path, compile="off", prefetch="off") as engine:
        logits(engine, 4)
        assert {step._rotation for step in steps(engine, LatentStep)} == {"apart" if interleave else "halves"}


def test_an_attention_that_is_another_keeps_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = save_tiny(tmp_path, "deepseek_v3"), LatentStep.run

    def wrong(step: LatentStep, *args: Any) -> torch.Tensor:
        return other(step, *args) + (step.module.layer_idx == 1)

    monkeypatch.setattr(LatentStep, "run", wrong)
    with open_tiny(folder, compile="off", prefetch="off") as engine:
        rows = torch.cat([logits(engine, NUM_NEW), logits(engine, NUM_NEW)])
        assert [step.module.layer_idx for step in steps(engine, LatentStep)] == [0, 2]
        assert calls_of(engine) == 2 * 3
    monkeypatch.setenv("OFFMOE_CPU_KERNELS", "off")
    with open_tiny(folder, compile="off", prefetch="off") as engine:
        assert not steps(engine, LatentStep)
        wanted = torch.cat([logits(engine, NUM_NEW), logits(engine, NUM_NEW)])
    assert (rows - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_bfloat16_is_taken(tmp_path: Path) -> None:
    save_layout(build("deepseek_v2", dtype=torch.bfloat16), tmp_path, "published")
    with open_tiny(tmp_path, compile="off", prefetch="off") as engine:
        logits(engine, 4)
        assert calls_of(engine) == 3 * 3


def test_more_than_attention_is_left_alone() -> None:
    class Plain:
        def forward(self, hidden_states: Any, position_embeddings: Any, past: Any) -> Any:
            latent, turned = torch.split(self.kv_a_proj_with_mqa(hidden_states), [3, 4])
            query, turned = apply_rotary_emb(self.q_proj(hidden_states), turned, position_embeddings)
            return self.o_proj(past.update(query, self.expand_kv(latent, turned)))

    class Indexed(Plain):
        def forward(self, hidden_states: Any, position_embeddings: Any, past: Any) -> Any:
            latent, turned = torch.split(self.kv_a_proj_with_mqa(hidden_states), [3, 4])
            query, turned = apply_rotary_emb(self.q_proj(hidden_states), turned, position_embeddings)
            return self.o_proj(past.update(query, self.expand_kv(latent, turned)), self.indexer(query))

    class Scaled(Plain):
        def forward(self, hidden_states: Any, position_embeddings: Any, past: Any) -> Any:
            latent, turned = torch.split(self.kv_a_proj_with_mqa(hidden_states), [3, 4])
            query, turned = apply_rotary_emb(self.q_proj(hidden_states) * 2, turned, position_embeddings)
            return self.o_proj(past.update(query, self.expand_kv(latent, turned)))

    def is_taken(attention: Any) -> bool:
        return calls_only(attention, _KNOWN_CALLS, _ROTATES)

    assert is_taken(Plain)
    assert not is_taken(Indexed)
    assert not is_taken(Scaled)


def apply_rotary_emb(query: Any, key: Any, angles: Any) -> tuple[Any, Any]:
    raise NotImplementedError
