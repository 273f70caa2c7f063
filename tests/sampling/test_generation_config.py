"""generation_config.json: every rule gives the ids of transformers' `generate`, or is named in a note."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_families import build_adapted
from engines import PROMPT, open_tiny, save_tiny
from families import save_layout
from small_edits import always, byte_tokenizer, edit_json
from transformers import GenerationConfig, PreTrainedModel

import offmoe
from offmoe.core.errors import UsageError
from offmoe.sampling.processors import not_followed, publisher_rules, reply_length
from offmoe.sampling.sampler import make_chooser, resolve_sampling

NUM_NEW = 14


@pytest.fixture(scope="module")
def usual(engine: offmoe.Engine) -> list[int]:
    return list(engine.generate(PROMPT, max_new_tokens=NUM_NEW, temperature=0).token_ids)


def settings(usual: list[int]) -> dict[str, dict[str, Any]]:
    """Each changes what the tiny model would say."""
    return {
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "suppress_tokens": {"suppress_tokens": usual[:3]},
        "begin_suppress_tokens": {"begin_suppress_tokens": usual[:2]},
        "bad_words_ids": {"bad_words_ids": [[usual[1]], usual[3:5]]},
        "sequence_bias": {"sequence_bias": [[[usual[2]], -50.0], [[7], 1.5]]},
        "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": usual[4]},
        "min_length": {"min_length": 17, "eos_token_id": usual[3]},
        "exponential decay": {"exponential_decay_length_penalty": [2, 1.7], "eos_token_id": 9},
        "with a penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    }


@pytest.mark.parametrize("name", list(settings([0] * NUM_NEW)))
def test_rules_give_the_ids_of_transformers(
    name: str, engine: offmoe.Engine, plain: PreTrainedModel, usual: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GenerationConfig(do_sample=False, pad_token_id=0, **settings(usual)[name])
    wanted = plain.generate(torch.tensor([PROMPT]), generation_config=config, max_new_tokens=NUM_NEW)[0, len(PROMPT) :]
    ends = config.eos_token_id
    monkeypatch.setattr(engine.model, "generation_config", config)
    monkeypatch.setattr(engine, "_end_ids", frozenset() if ends is None else frozenset([ends]))
    got = list(engine.generate(PROMPT, max_new_tokens=NUM_NEW).token_ids)
    assert got == [token for token in wanted.tolist() if token not in (ends, 0 if ends is not None else None)]
    assert got != usual, "the setting acts"


@pytest.mark.parametrize(
    "warper", [{"typical_p": 0.3}, {"epsilon_cutoff": 0.02}, {"eta_cutoff": 0.2}, {"typical_p": 0.4, "top_p": 0.9}]
)
def test_warpers_leave_the_tokens_that_transformers_leaves(
    warper: dict[str, float], engine: offmoe.Engine, plain: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GenerationConfig(do_sample=True, pad_token_id=0, top_k=0, temperature=0.8, **warper)
    monkeypatch.setattr(engine.model, "generation_config", config)
    rules = publisher_rules(config, num_prompt=len(PROMPT), end_ids=frozenset(), device=engine.model.device)
    logits = 3 * torch.randn(1, 128, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([PROMPT])
    wanted = plain._get_logits_processor(config, input_ids_seq_length=len(PROMPT))(ids, logits).softmax(-1)
    left = {make_chooser(resolve_sampling(config, seed=seed), None, rules)(ids, logits) for seed in range(150)}
    allowed = set(wanted[0].nonzero().flatten().tolist())
    assert left <= allowed and len(allowed) < 128
    assert int(wanted.argmax()) in left


def test_a_negative_top_k_is_off() -> None:
    assert resolve_sampling(GenerationConfig.from_dict({"do_sample": True, "top_k": -1})).top_k == 0


def test_stop_strings_of_the_publisher_end_a_reply(folder: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path)
    byte_tokenizer(model)
    edit_json(model / "generation_config.json", stop_strings=["cd"])
    with open_tiny(model) as engine:
        assert engine.tokenizer is not None
        wanted = list(engine.tokenizer("abcdef")["input_ids"])
        reply = engine.generate("a", max_new_tokens=6, ignore_eos=True, choose=always(engine, wanted))
        assert (reply.text, reply.finish_reason) == ("ab", "stop")
        reply = engine.generate("a", max_new_tokens=6, ignore_eos=True, choose=always(engine, wanted), stop="b")
        assert reply.text == "a"


def test_a_reply_is_as_long_as_the_publisher_says(
    engine: offmoe.Engine, plain: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers does it. `max_length`, in many files an old default, is left alone."""
    config = GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=5, max_length=14)
    monkeypatch.setattr(engine.model, "generation_config", config)
    wanted = plain.generate(torch.tensor([PROMPT]), generation_config=config)[0, len(PROMPT) :]
    assert list(engine.generate(PROMPT, ignore_eos=True).token_ids) == wanted.tolist()
    assert len(engine.generate(PROMPT, max_new_tokens=7, ignore_eos=True).token_ids) == 7
    assert reply_length(None, GenerationConfig(max_length=20)) == reply_length(None, None) == 256
    assert reply_length(None, GenerationConfig(max_new_tokens=300)) == 300


def test_stop_strings_without_a_tokenizer_are_named(tmp_path: Path) -> None:
    model = save_tiny(tmp_path)
    edit_json(model / "generation_config.json", stop_strings=["cd"])
    with open_tiny(model) as engine:
        (note,) = [note for note in engine.stats()["notes"] if "generation_config.json" in note]
    assert "stop_strings ['cd'] (the model has no tokenizer), which offmoe does not follow" in note


def test_what_is_not_followed_is_said(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    edit_json(folder / "generation_config.json", num_beams=4, guidance_scale=1.5)
    with open_tiny(folder) as engine:
        (note,) = [note for note in engine.stats()["notes"] if "generation_config.json" in note]
    assert "num_beams 4" in note and "guidance_scale 1.5" in note
    assert not_followed(GenerationConfig()) is None
    assert not_followed(GenerationConfig(forced_bos_token_id=7)) is None, "which is followed"


@pytest.mark.parametrize("name", ["begin", "shortest", "forced", "forced begin", "n-grams"])
def test_a_decoder_with_an_encoder_counts_its_own_tokens(
    name: str, translator: tuple[PreTrainedModel, offmoe.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's tokens are none of the reply's; its length was taken for the place where the reply begins."""
    plain, engine = translator
    start = engine.model.generation_config.decoder_start_token_id  # type: ignore[union-attr]
    usual = list(engine.generate(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True).token_ids)
    options: dict[str, Any] = {
        "begin": {"begin_suppress_tokens": usual[:1]},
        "shortest": {"min_new_tokens": 3, "eos_token_id": usual[0]},
        "forced": {"forced_bos_token_id": 7},
        "forced begin": {"forced_bos_token_id": 7, "begin_suppress_tokens": [35]},
        "n-grams": {"no_repeat_ngram_size": 1},
    }[name]
    config = GenerationConfig(
        do_sample=False, pad_token_id=0, decoder_start_token_id=start, max_new_tokens=NUM_NEW, **options
    )
    wanted = plain.generate(torch.tensor([PROMPT]), generation_config=config)[0, 1:].tolist()
    ends = frozenset([config.eos_token_id]) if config.eos_token_id is not None else frozenset[int]()
    monkeypatch.setattr(engine.model, "generation_config", config)
    monkeypatch.setattr(engine, "_end_ids", ends)
    got = list(engine.generate(PROMPT, max_new_tokens=NUM_NEW).token_ids)
    assert got == [token for token in wanted if token not in ends]
    assert got != usual, "the setting acts"


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PreTrainedModel, offmoe.Engine]]:
    folder = tmp_path_factory.mktemp("translator")
    plain = build_adapted("switch_transformers")
    save_layout(plain, folder, "published")
    with offmoe.load(folder, ram="4GiB", expert_slots=6) as engine:
        yield plain, engine


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("bad_words_ids", [], "non-empty"), ("bad_words_ids", [[100_000]], "100000"),
        ("sequence_bias", [[[100_000], 1.0]], "100000"), ("no_repeat_ngram_size", -1, "-1"),
        ("typical_p", -0.5, "typical_p"), ("suppress_tokens", "x", "str"),
        ("exponential_decay_length_penalty", 5, "subscriptable"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_in_one_line(
    name: str, value: Any, said: str, engine: offmoe.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GenerationConfig(do_sample=True, eos_token_id=5)
    setattr(config, name, value)
    monkeypatch.setattr(engine.model, "generation_config", config)
    monkeypatch.setattr(engine, "_end_ids", frozenset([5]))
    with pytest.raises(UsageError, match=f"generation_config.json .*{said}.*; mend or remove it there$"):
        engine.generate(PROMPT, max_new_tokens=2)
