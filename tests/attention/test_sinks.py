"""Attention with sinks by the fused operation: the family's own results, and no scores."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import families
import pytest
import torch
from engines import open_tiny, save_tiny
from largest import Largest
from transformers import AttentionInterface, PreTrainedModel

from offmoe.attention import sinks
from offmoe.attention.sinks import EAGER, SINKS, fuse_sinks
from offmoe.kv.cache import make_kv_cache
from offmoe.loader.budgets import model_shape
from offmoe.memory.family_facts import facts_of_family

FUSED = ["deepseek_v4", "flint", "gpt_oss", "granitemoe_swa", "mimo_v2_flash"]
# Sparse attention that asks for the function's name; sinks made for each token.
EAGER_STILL = ["hy_v4", "inkling2"]


def run(model: PreTrainedModel, sizes: list[int]) -> torch.Tensor:
    """All logits of a sequence that goes through in pieces of these sizes."""
    ids = torch.randint(3, 128, (1, sum(sizes)), generator=torch.Generator().manual_seed(2))
    cache, logits = make_kv_cache(model, sum(sizes)), []
    with torch.inference_mode():
        for piece in ids.split(sizes, dim=1):
            output = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of each call of the fused operation for a model."""
    fused, counted = sinks._fused, []

    def noting(query: torch.Tensor, *rest: object) -> torch.Tensor:
        counted.append(query.shape[2])
        return fused(query, *rest)

    monkeypatch.setattr(sinks, "_fused", noting)
    yield counted


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("sizes", [[80], [40, 40, 1, 1], [1, 1, 1], [7, 64, 3]])
def test_logits_are_those_of_the_family(name: str, sizes: list[int], calls: list[int]) -> None:
    """Windows of 8 tokens, keys wider than values, compressed context: whatever the family has."""
    theirs, model = run(families.build(name), sizes), families.build(name)
    fuse_sinks(model)
    assert model.config.get_text_config()._attn_implementation == SINKS
    calls.clear()
    torch.testing.assert_close(run(model, sizes), theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    assert [size for size, _ in itertools.groupby(calls)] == [size for size, _ in itertools.groupby(sizes)]


@pytest.mark.parametrize("name", EAGER_STILL)
def test_other_attention_stays(name: str, calls: list[int]) -> None:
    model = families.build(name)
    fuse_sinks(model)
    assert model.config.get_text_config()._attn_implementation == EAGER
    run(model, [9])
    assert not calls


def test_a_function_that_differs_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("gpt_oss")
    module = sys.modules[type(model).__module__]
    right = module.eager_attention_forward

    def wrong(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):  # type: ignore[no-untyped-def]
        output, weights = right(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
        return output * 1.001, weights

    monkeypatch.setattr(module, "eager_attention_forward", wrong)
    fuse_sinks(model)
    assert model.config._attn_implementation == EAGER
    monkeypatch.undo()
    fuse_sinks(model)
    assert model.config._attn_implementation == SINKS


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)], ids=str
)
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_long_contexts_by_type(dtype: torch.dtype, tolerance: float, num_tokens: int) -> None:
    """Against float64; 8 heads share 2 keys, and a sink may outweigh all tokens together."""
    random = torch.Generator().manual_seed(num_tokens)
    query, key, value = (
        torch.randn(1, heads, length, width, generator=random).to(dtype)
        for heads, length, width in ((8, num_tokens, 64), (2, 700, 64), (2, 700, 48))
    )
    logits_H = torch.tensor([-30.0, -2, 0, 1, 3, 6, 9, 40])
    seen = torch.ones(num_tokens, 700, dtype=torch.bool).tril(700 - num_tokens).triu(100)
    mask = torch.zeros(1, 1, *seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    scores = query.double() @ key.double().repeat_interleave(4, 1).mT / 8
    scores = scores.masked_fill(~seen, -torch.inf)
    sink = logits_H.double().view(1, 8, 1, 1).expand(1, 8, num_tokens, 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    expected = (weights @ value.double().repeat_interleave(4, 1)).transpose(1, 2)
    with torch.inference_mode():
        found = sinks._fused(query, key, value, mask, 1 / 8, logits_H.to(dtype))
    assert found.dtype == dtype and found.is_contiguous()
    by_head = (found.double() - expected).abs().amax((0, 1, 3)) / expected.abs().amax((0, 1, 3))
    assert by_head[:-1].max() < tolerance, by_head  # of the last head nearly nothing is left
    assert (found.double() - expected)[:, :, -1].abs().max() < 1e-12


def test_no_scores_are_written() -> None:
    model, scores = families.build("gpt_oss"), 4 * 200 * 200
    for expected in (True, False):
        with Largest() as watch:
            run(model, [200])
        assert (watch.largest >= scores) is expected
        fuse_sinks(model)


def test_who_wants_more_gets_the_family_s_own(calls: list[int]) -> None:
    """Weights that are asked for, gradients, and masks of another type."""
    model = families.build("gpt_oss")
    fuse_sinks(model)
    calls.clear()
    attention, ours = model.model.layers[0].self_attn, AttentionInterface()[SINKS]
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 6, 16, generator=random) for heads in (4, 2))
    given = (attention, query, key, key, None)
    assert ours(*given, scaling=0.25)[1].shape == (1, 4, 6, 6)
    with torch.inference_mode():
        expected = ours(*given, scaling=0.25, output_attentions=True)[0]
        masked = ours(attention, query, key, key, torch.zeros(1, 1, 6, 6, dtype=torch.float64), scaling=0.25)
        assert not calls
        torch.testing.assert_close(masked[0].float(), expected)
        torch.testing.assert_close(ours(*given, scaling=0.25)[0], expected)
    assert calls == [6]
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    assert attention.sinks.grad is not None and calls == [6]


@pytest.mark.parametrize("name", [*FUSED, *EAGER_STILL])
def test_plans_know_the_families(name: str) -> None:
    """What headers alone say of scores is what the loader finds."""
    config = families.make_config(name)
    model = families.model_class(name)._from_config(config)
    fuse_sinks(model)
    shape, model_type = model_shape(model), model.config.get_text_config().model_type
    facts = facts_of_family(model_type)
    is_known = (facts.has_sinks, facts.writes_scores)
    assert is_known == (name in FUSED, name in EAGER_STILL)
    indexer = 8 * getattr(config, "index_n_heads", 0)
    assert (shape.score_bytes <= indexer) is (name in FUSED)
    assert shape.device_score_bytes > indexer


def test_an_engine_runs_it_and_plans_without_scores(tmp_path: Path, calls: list[int]) -> None:
    folder = save_tiny(tmp_path, "gpt_oss")
    own = families.build("gpt_oss")
    ids = torch.arange(3, 60)[None]
    with open_tiny(folder, compile="off") as engine, torch.inference_mode():
        calls.clear()
        torch.testing.assert_close(engine.model(input_ids=ids).logits, own(input_ids=ids).logits, rtol=0, atol=1e-5)
        assert calls == [57] * 3
        assert model_shape(engine.model).score_bytes == 0
