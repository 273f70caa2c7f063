"""Attention in less memory: the same results, and nobody else's model notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from largest import Largest
from transformers import (
    AttentionInterface,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import offmoe
from offmoe.attention.sdpa import absorb_latents, save_memory
from offmoe.kv.cache import make_kv_cache

LATENT = DeepseekV3Config(
    vocab_size=128, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
    n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=24, q_lora_rank=32, qk_rope_head_dim=8, v_head_dim=12,
    qk_nope_head_dim=16, head_dim=8,
)  # fmt: skip
SHARED = Qwen3MoeConfig(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_function() -> Iterator[None]:
    before = AttentionInterface()["sdpa"]
    yield
    AttentionInterface.register("sdpa", before)


@pytest.fixture(params=[LATENT, SHARED], ids=["latent", "shared heads"])
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(transformers' own, ours), with the same weights."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        kind = DeepseekV3ForCausalLM if isinstance(request.param, DeepseekV3Config) else Qwen3MoeForCausalLM
        models.append(kind(type(request.param)(**request.param.to_dict())).eval())
    assert models[0].config._attn_implementation == "sdpa"
    save_memory(models[1])
    absorb_latents(models[1])
    return models[0], models[1]


def run(model: torch.nn.Module, sizes: list[int]) -> torch.Tensor:
    """All logits of a sequence that goes through in pieces of these sizes."""
    ids = torch.randint(3, 128, (1, sum(sizes)), generator=torch.Generator().manual_seed(2))
    cache = make_kv_cache(model, sum(sizes))
    logits = []
    with torch.inference_mode():
        for piece in ids.split(sizes, dim=1):
            logits.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("sizes", [[80], [40, 40, 1, 1], [1, 1, 1], [70, 70, 5, 1], [7, 64, 65, 3]])
def test_logits_are_those_of_transformers(pair: tuple[torch.nn.Module, torch.nn.Module], sizes: list[int]) -> None:
    theirs, ours = (run(model, sizes) for model in pair)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_shared_heads_give_the_same_bits() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 8, 20, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
    mask = torch.ones(1, 1, 20, 50, dtype=torch.bool).tril(30)
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    before = AttentionInterface()["sdpa"](module, query, keys, values, mask, scaling=0.3)[0]
    model = Qwen3MoeForCausalLM(SHARED)
    save_memory(model)
    ours = AttentionInterface()["sdpa"]
    attention = model.model.layers[0].self_attn
    with Largest() as watch:
        assert torch.equal(ours(attention, query, keys, values, mask, scaling=0.3)[0], before)
    assert watch.largest == query.numel()
    with Largest() as watch:  # a module of another model: transformers' own, copies and all
        assert torch.equal(ours(module, query, keys, values, mask, scaling=0.3)[0], before)
    assert watch.largest == 8 * 50 * 16


@pytest.mark.parametrize(
    ("sizes", "expanded"), [([90, 1], [90]), ([90, 64], [90]), ([60, 60, 1], [60]), ([90, 65, 1], [90, 155])]
)
def test_few_tokens_expand_no_context(sizes: list[int], expanded: list[int]) -> None:
    """A first piece comes without a mask, and is expanded too."""
    model = DeepseekV3ForCausalLM(LATENT).eval()
    save_memory(model)
    absorb_latents(model)
    rows: list[int] = []
    model.model.layers[1].self_attn.kv_b_proj.register_forward_hook(
        lambda module, args, out: rows.append(out.shape[-2])
    )
    run(model, sizes)
    assert rows == expanded


def test_a_latent_way_that_differs_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DeepseekV3ForCausalLM(LATENT).eval()
    expected = run(model, [30, 1])
    save_memory(model)
    attention = model.model.layers[0].self_attn
    right = type(attention).expand_kv
    monkeypatch.setattr(type(attention), "expand_kv", lambda *args: tuple(2 * states for states in right(*args)))
    absorb_latents(model)
    assert not attention._offmoe_attention.absorbs
    monkeypatch.undo()
    torch.testing.assert_close(run(model, [30, 1]), expected)


def test_the_cache_holds_latent_and_key_side_by_side() -> None:
    model = DeepseekV3ForCausalLM(LATENT).eval()
    cache = make_kv_cache(model, 16)
    assert cache is not None
    model(input_ids=torch.arange(5)[None], past_key_values=cache, use_cache=True)
    latents, rotated = cache.layers[0].keys, cache.layers[0].values
    assert latents.untyped_storage().data_ptr() == rotated.untyped_storage().data_ptr()
    assert (latents.shape[-1], rotated.shape[-1]) == (24, 8)
    assert rotated.storage_offset() - latents.storage_offset() == 24


def test_an_engine_leaves_other_models_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(LATENT).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 40)[None]
    before = model(input_ids=ids).logits
    with offmoe.load(str(tmp_path), ram="4GiB") as engine, torch.no_grad():
        torch.testing.assert_close(engine.model(input_ids=ids).logits, before, rtol=0, atol=1e-5)
        assert torch.equal(model(input_ids=ids).logits, before)
