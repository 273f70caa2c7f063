"""A prompt whose begin is kept gives the logits of a fresh reading, bit by bit: rows, windows, running states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import open_tiny, save_tiny
from families import build, save_layout

import offmoe
from offmoe.core.errors import UsageError

IDS = [(i * 37 + 5) % 120 for i in range(240)]
OTHER = [(i * 31 + 7) % 120 for i in range(150)]
# Whose rows are computed in blocks of 64 tokens: full attention, latents.
IN_BLOCKS = ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "granitemoe"]
# Which are kept at the ends of prefill chunks: delta nets, mixers, indexers; windows of 8 tokens, which hold no more.
IN_CHUNKS = ["gpt_oss", "gemma4", "qwen3_next", "granitemoehybrid", "deepseek_v32", "lfm2_moe"]


def logits(engine: offmoe.Engine, ids: list[int], **options: Any) -> tuple[list[torch.Tensor], int]:
    """Logits behind the prompt and behind two tokens of the reply, and how many tokens were reused."""
    seen: list[torch.Tensor] = []

    def choose(ids: torch.Tensor, scores: torch.Tensor) -> int:
        seen.append(scores.clone())
        return int(scores.argmax())

    reply = engine.generate(ids, choose=choose, max_new_tokens=3, ignore_eos=True, **options)
    return seen, reply.stats.reused_tokens


def save(folder: Path, name: str, dtype: torch.dtype) -> Path:
    if dtype == torch.float32:
        return save_tiny(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    save_layout(build(name).to(dtype), folder, "published")
    return folder


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", IN_BLOCKS + IN_CHUNKS)
def test_kept_prompts_give_the_logits_of_fresh_ones(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options = {"prefill_chunk": 128 if name in IN_BLOCKS else 64, "context_length": 256, "kept_prompts": "64MiB"}
    with open_tiny(save(tmp_path, name, dtype), **options) as engine:
        fresh, _ = logits(engine, IDS, reuse=False)
        first, num = logits(engine, IDS[:215])
        assert num == 0
        between, num = logits(engine, OTHER)  # another prompt: the long one is not thrown away
        assert num == 0
        got, num = logits(engine, IDS)
        assert num == 192 and equal(got, fresh)
        assert equal(logits(engine, OTHER, reuse=False)[0], between)
        assert equal(logits(engine, IDS[:215], reuse=False)[0], first)
        stats = engine.stats().kept_prompts
        assert stats is not None and 0 < stats["bytes"] <= stats["budget_bytes"] and stats["hit_tokens"]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[offmoe.Engine]:
    with open_tiny(save_tiny(tmp_path), prefill_chunk=128, context_length=256, kept_prompts="8MiB") as engine:
        yield engine


def test_namespaces_do_not_see_each_other(engine: offmoe.Engine) -> None:
    assert logits(engine, IDS, cache_salt="a")[1] == 0
    assert logits(engine, IDS, cache_salt="b")[1] == 0
    assert logits(engine, IDS)[1] == 0
    for salt in ("a", "b", None):
        assert logits(engine, [*IDS[:230], 1, 2], cache_salt=salt)[1] == 192
    with pytest.raises(UsageError, match="cache_salt"):
        engine.generate(IDS, cache_salt="")


def test_prompts_that_begin_alike_share_their_blocks(engine: offmoe.Engine) -> None:
    logits(engine, IDS)
    logits(engine, [*IDS[:64], *OTHER])
    logits(engine, OTHER)
    assert engine._kept.keeper is not None
    assert len(engine._kept.keeper.blocks) == 3 + 2 + 2
    engine._kept.keeper.blocks.check_integrity()


def test_what_was_not_to_be_kept_is_not(engine: offmoe.Engine) -> None:
    logits(engine, IDS, reuse=False)
    assert logits(engine, IDS)[1] == 0
    assert logits(engine, IDS, reuse=False)[1] == 0


def test_the_memory_is_never_more_than_planned(tmp_path: Path) -> None:
    with open_tiny(save_tiny(tmp_path), prefill_chunk=128, context_length=256, kept_prompts="1MiB") as engine:
        assert engine.plan.kept_bytes == 1 << 20 and "kept prompts 1.0 MiB" in engine.plan.line()
        keeper = engine._kept.keeper
        assert keeper is not None
        for salt in range(40):
            ids = [(i * 7 + salt) % 120 for i in range(240)]
            fresh, _ = logits(engine, ids, reuse=False)
            logits(engine, ids)
            logits(engine, OTHER)
            assert equal(logits(engine, ids)[0], fresh)
            keeper.blocks.check_integrity()
        assert keeper.blocks.num_evicted > 0


def test_nothing_is_kept_where_no_memory_is_for_it(tmp_path: Path) -> None:
    with open_tiny(save_tiny(tmp_path), prefill_chunk=128, context_length=256, kept_prompts=0) as engine:
        assert engine.plan.kept_bytes == 0 and engine.stats().kept_prompts is None
        logits(engine, IDS)
        assert logits(engine, [*IDS[:220], 3])[1] == 192, "the last prompt is still there"
        logits(engine, OTHER)
        assert logits(engine, IDS)[1] == 0
