"""Models that compute no numbers: the reply stops with the layer; and numbers at the edge of what options may be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fail
from engines import PROMPT, assert_at_rest, open_tiny, save_tiny
from makers import one_line
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import offmoe
from offmoe.core.errors import NonFiniteError, UsageError
from offmoe.report.perplexity import perplexity
from offmoe.sampling.finite import is_finite
from offmoe.sampling.sampler import make_chooser, resolve_sampling


def spoil(folder: Path, part: str, value: float) -> Path:
    """One number of a tensor of a tiny model."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        found = [name for name in tensors if part in name]
        if found:
            tensors[found[0]].view(-1)[0] = value
            save_file(tensors, path, metadata={"format": "pt"})
            return folder
    raise AssertionError(f"no {part}")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[offmoe.Engine]:
    with open_tiny(save_tiny(tmp_path_factory.mktemp("healthy"))) as engine:
        yield engine


@pytest.mark.parametrize(
    ("part", "value", "where"),
    [
        ("layers.1.self_attn.o_proj", math.nan, r"layer 1 \(model\.layers\.1\.self_attn"),
        ("layers.2.post_attention_layernorm", math.inf, r"layer 2 \(model\.layers\.2\.post_attention_layernorm\)"),
        ("layers.1.mlp.down_proj", -math.inf, r"layer 1 \(model\.layers\.1\.mlp"),
        ("model.norm.weight", math.nan, r"model\.norm"), ("lm_head.weight", math.nan, r"lm_head"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8, "seed": 1}])
def test_the_layer_is_named(tmp_path: Path, part: str, value: float, where: str, options: dict[str, Any]) -> None:
    with open_tiny(spoil(save_tiny(tmp_path), part, value)) as engine:
        for _ in range(2):
            with pytest.raises(NonFiniteError, match=f"after 10 tokens; they begin in {where}") as caught:
                engine.generate(PROMPT, max_new_tokens=3, **options)
            one_line(caught)
        assert_at_rest(engine)


def test_an_expert_is_found_when_it_is_used(tmp_path: Path) -> None:
    """Prompts that do not use it are answered, before and after."""
    folder = spoil(save_tiny(tmp_path), "layers.2.mlp.experts.3.down_proj", math.nan)
    with open_tiny(folder) as engine:
        outcomes = []
        for first in range(24):
            try:
                engine.generate([first, 5], max_new_tokens=1, temperature=0)
                outcomes.append("fine")
            except NonFiniteError as error:
                assert "after 2 tokens; they begin in layer 2 (model.layers.2.mlp.experts" in str(error)
                outcomes.append("stopped")
        assert set(outcomes) == {"fine", "stopped"}


def test_in_the_midst_of_a_reply(healthy: offmoe.Engine) -> None:
    """A second pass that finds nothing says so, and the engine goes on."""
    pieces = healthy.stream(PROMPT, max_new_tokens=8, ignore_eos=True)
    expected = healthy.generate(PROMPT, max_new_tokens=4, ignore_eos=True, reuse=False).token_ids
    head = healthy.model.get_output_embeddings()
    next(pieces), next(pieces)
    hook = head.register_forward_hook(lambda module, args, output: output * math.nan)
    with pytest.raises(NonFiniteError, match=r"after 1[12] tokens; they begin in lm_head"):
        list(pieces)
    hook.remove()
    assert healthy.generate(PROMPT, max_new_tokens=4, ignore_eos=True).token_ids == expected


def test_what_measures_a_model_stops_too(tmp_path: Path) -> None:
    folder = spoil(save_tiny(tmp_path), "layers.1.self_attn.o_proj", math.nan)
    with open_tiny(folder) as engine, pytest.raises(NonFiniteError, match="after 10 tokens; they begin in layer 1"):
        perplexity(engine, PROMPT)
    said = fail("verify", folder, "--ram", "4GiB", "--max-new-tokens", 2)
    assert "begin in layer 1 (model.layers.1.self_attn" in said, "and not the cache"


def test_what_is_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        row = torch.zeros((1, 9), dtype=dtype)
        assert is_finite(row)
        for value, fine in ((math.nan, False), (math.inf, False), (-math.inf, True)):
            row[0, 4] = value
            assert is_finite(row) == fine
    assert not is_finite(torch.full((1, 4), -math.inf))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 1e-9}, {"temperature": 1e-7},
        {"temperature": 1.0, "top_p": 1e-30}, {"temperature": 1e-40, "top_p": 1e-30, "top_k": 3, "min_p": 0.5},
    ],
)  # fmt: skip
def test_next_to_nothing_is_greedy(healthy: offmoe.Engine, options: dict[str, float]) -> None:
    expected = healthy.generate(PROMPT, max_new_tokens=8, temperature=0, ignore_eos=True)
    assert (
        healthy.generate(PROMPT, max_new_tokens=8, seed=3, ignore_eos=True, **options).token_ids == expected.token_ids
    )


@pytest.mark.parametrize("scale", [1.0, 1e30, 3e38])
@pytest.mark.parametrize("temperature", [1e-8, 1e-5, 9e-4, 1e3, 1e38])
def test_large_logits_at_any_temperature(scale: float, temperature: float) -> None:
    logits = torch.tensor([[0.1, 0.9, 0.5, -1.0]]) * scale
    choose = make_chooser(resolve_sampling(GenerationConfig(), temperature=temperature, seed=1))
    chosen = {choose(torch.tensor([[0]]), logits) for _ in range(20)}
    assert chosen == {1} if scale / temperature > 1e3 else len(chosen) > 1


@pytest.mark.parametrize("penalty", [1e38, 1e300])
@pytest.mark.parametrize("temperature", [0, 1.0, 1e-40])
def test_a_huge_penalty_takes_what_was_not_said(penalty: float, temperature: float) -> None:
    choose = make_chooser(
        resolve_sampling(GenerationConfig(), temperature=temperature, repetition_penalty=penalty, seed=1)
    )
    logits = torch.tensor([[-3.0, -2.0, -500.0]])
    assert choose(torch.tensor([[0, 1]]), logits) == 2
    with pytest.raises(UsageError, match="rule out every token"):
        choose(torch.tensor([[0, 1, 2]]), logits * 1e10)
