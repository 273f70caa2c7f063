"""How tokens are chosen: as transformers chooses them, repeatably, whatever is cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import PROMPT, TINY_EXPERTS, open_tiny, save_tiny
from makers import one_line
from transformers import GenerationConfig, PreTrainedModel

import offmoe
from offmoe.core.errors import UsageError
from offmoe.sampling.params import SamplingParams
from offmoe.sampling.sampler import resolve_sampling

NUM_NEW = 24
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def sample(engine: offmoe.Engine, **options: Any) -> tuple[int, ...]:
    return engine.generate(PROMPT, max_new_tokens=NUM_NEW, **options).token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 0.8, "repetition_penalty": 1.7},
        {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1},
    ],
)
def test_samples_are_those_of_transformers(
    engine: offmoe.Engine, plain: PreTrainedModel, options: dict[str, Any]
) -> None:
    torch.manual_seed(5)
    defaults = {"top_k": 0, "top_p": 1.0}
    expected = plain.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_NEW, do_sample=True, **{**defaults, **options})
    assert list(sample(engine, seed=5, **options)) == expected[0, len(PROMPT) :].tolist()


def test_greedy_with_a_penalty_is_that_of_transformers(engine: offmoe.Engine, plain: PreTrainedModel) -> None:
    expected = plain.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_NEW, do_sample=False, repetition_penalty=3.0)
    got = sample(engine, temperature=0, repetition_penalty=3)
    assert list(got) == expected[0, len(PROMPT) :].tolist()
    assert got != sample(engine, temperature=0)


def test_a_seed_repeats_at_every_cache_size(folder: Path, engine: offmoe.Engine) -> None:
    first = sample(engine, temperature=1.0, seed=11)
    assert sample(engine, temperature=1.0, seed=11) == first
    assert sample(engine, temperature=1.0, seed=12) != first
    for slots in (2, TINY_EXPERTS):
        with open_tiny(folder, expert_slots=slots) as other:
            assert sample(other, temperature=1.0, seed=11) == first


def test_without_a_seed_samples_differ(engine: offmoe.Engine) -> None:
    assert sample(engine, temperature=1.0) != sample(engine, temperature=1.0)


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_only_the_likeliest_is_greedy(engine: offmoe.Engine, option: dict[str, float]) -> None:
    assert sample(engine, temperature=1.0, seed=1, **option) == sample(engine, temperature=0)


def test_the_publishers_settings_are_the_default(folder: Path, tmp_path: Path) -> None:
    copy = save_tiny(tmp_path)
    GenerationConfig(do_sample=True, temperature=0.7, top_k=9, eos_token_id=None).save_pretrained(copy)
    with open_tiny(copy) as engine:
        assert sample(engine, seed=3) == sample(engine, seed=3, temperature=0.7, top_k=9)
        assert sample(engine, seed=3, temperature=0) == sample(engine, top_k=1, seed=0)
    given = GenerationConfig(temperature=0.7, top_p=0.5)
    assert resolve_sampling(given).temperature == 0.0, "without do_sample, the publisher means greedy"
    assert resolve_sampling(GenerationConfig()) == SamplingParams(**GREEDY)


@pytest.mark.parametrize(
    ("option", "value", "limits"),
    [
        ("temperature", -0.1, "of at least 0"), ("temperature", "hot", "of at least 0"),
        ("temperature", float("nan"), "of at least 0"), ("temperature", float("inf"), "of at least 0"),
        ("top_k", -1, "whole number of at least 0"), ("top_k", 2.5, "whole number"), ("top_k", True, "whole number"),
        ("top_p", 0.0, "between 1e-06 and 1"), ("top_p", 1.1, "between 1e-06 and 1"),
        ("min_p", -0.5, "between 0 and 1"), ("min_p", 2, "between 0 and 1"),
        ("repetition_penalty", 0, "of at least 1e-06"), ("repetition_penalty", [1], "of at least 1e-06"),
        ("repetition_penalty", 10**400, "of at least 1e-06"), ("top_p", 10**400, "between 1e-06 and 1"),
        ("seed", -3, "whole number of at least 0"), ("seed", 1 << 64, "whole number"), ("seed", "x", "whole number"),
    ],
)  # fmt: skip
def test_values_out_of_range_name_the_range(engine: offmoe.Engine, option: str, value: Any, limits: str) -> None:
    with pytest.raises(UsageError, match=f"{option} is .*; use a .*{limits}") as caught:
        engine.generate(PROMPT, **{option: value})
    one_line(caught)


def test_numbers_of_any_kind_are_numbers(engine: offmoe.Engine) -> None:
    given = {
        "temperature": np.float32(1.0),
        "top_k": np.int64(7),
        "top_p": 1,
        "repetition_penalty": 2,
        "seed": np.int32(4),
    }
    assert sample(engine, **given) == sample(engine, temperature=1.0, top_k=7, repetition_penalty=2.0, seed=4)


def test_a_bias_adds_to_a_logit(engine: offmoe.Engine) -> None:
    usual = sample(engine, temperature=0)
    assert usual[0] != 7
    assert set(sample(engine, temperature=0, logit_bias={7: 100})) == {7}
    assert set(sample(engine, temperature=0, logit_bias={"7": 100})) == {7}, "as JSON has it"
    assert usual[0] not in sample(engine, temperature=0, logit_bias={usual[0]: -100})
    assert sample(engine, temperature=0, logit_bias={}) == usual
    for bias, words in (
        ({7: 101}, r"logit_bias\[7\] is 101"),
        ({999: 1}, "999"),
        ({"x": 1}, "no token id"),
        (3, "mapping"),
    ):
        with pytest.raises(UsageError, match=words):
            sample(engine, logit_bias=bias)


def test_several_replies_to_one_prompt(engine: offmoe.Engine) -> None:
    replies = engine.generate(PROMPT, n=3, seed=4, temperature=1.5, max_new_tokens=8, reuse=True)
    assert [reply.token_ids for reply in replies] == [
        engine.generate(PROMPT, seed=4 + idx, temperature=1.5, max_new_tokens=8).token_ids for idx in range(3)
    ]
    assert len({reply.token_ids for reply in replies}) == 3
    assert replies[1].stats.reused_tokens == len(PROMPT)
    assert len(engine.generate([PROMPT, PROMPT[:4]], n=2, max_new_tokens=1)) == 4
    with pytest.raises(UsageError, match="n is 0"):
        engine.generate(PROMPT, n=0)
