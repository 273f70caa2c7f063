"""GGUF files that the gguf package wrote: logits and ids of the transformers model with the same values."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import load
from gguf import GGMLQuantizationType as Type
from gguf_makers import MODELS, make_model, save_gguf
from gguf_parts import split_gguf
from makers import Measured, one_line
from transformers import AutoTokenizer

import offmoe
from offmoe.checkpoint.gguf.config import gguf_sampling
from offmoe.checkpoint.gguf.header import GgufHeader
from offmoe.checkpoint.locate import demo_model_folder
from offmoe.core.errors import CheckpointError
from offmoe.hf.tokens.tokenizer import load_tokenizer
from offmoe.planner.inspect import inspect_checkpoint
from offmoe.sampling.params import SamplingParams
from offmoe.sampling.sampler import resolve_sampling
from offmoe.tiers.device import SimulatedDevice

NUM_PROMPT, NUM_NEW = 12, 24
# As llama.cpp's Q4_K_M: the down projections of some layers have more bits than those of the others.
Q4_K_M = {"gate": Type.Q4_K, "up": Type.Q4_K, "down": Type.Q4_K, "down.1": Type.Q6_K, "dense": Type.Q8_0}
IQ4_XS, IQ4_NL = Type.IQ4_XS, Type.IQ4_NL
ALL_Q8 = dict.fromkeys(("gate", "up", "down", "dense"), Type.Q8_0)
CASES: dict[str, tuple[str, dict[str, Type]]] = {
    **{f"{name}, q8_0": (name, ALL_Q8) for name in MODELS},
    "qwen3moe, f32": ("qwen3moe", {}),
    "qwen3moe, f16 experts": ("qwen3moe", dict.fromkeys(("gate", "up", "down"), Type.F16)),
    "qwen3moe, q4_0": ("qwen3moe", dict.fromkeys(("gate", "up", "down", "dense"), Type.Q4_0)),
    "qwen3moe, q4_k and q6_k": ("qwen3moe", Q4_K_M),
    "llama, q5_k": ("llama", {"gate": Type.Q5_K, "up": Type.Q5_K, "down": Type.Q6_K, "dense": Type.Q5_0}),
    "olmoe, q2_k and q3_k": ("olmoe", {"gate": Type.Q2_K, "up": Type.Q2_K, "down": Type.Q3_K, "dense": Type.Q4_1}),
    "gpt-oss, mxfp4": ("gpt-oss", dict.fromkeys(("gate", "up", "down"), Type.MXFP4)),
    "gpt-oss, f32": ("gpt-oss", {}),
    "qwen3moe, iq4_xs and iq4_nl": ("qwen3moe", {**dict.fromkeys(("gate", "up", "dense"), IQ4_XS), "down": IQ4_NL}),
}  # fmt: skip


# Where experts are computed, beside the default.
PLACES: dict[str, Callable[[], dict[str, Any]]] = {
    "in RAM": dict,
    "on a device": lambda: {"miss": "stream", "simulated": SimulatedDevice(1e9)},
    "beside a device": lambda: {"miss": "cpu", "simulated": SimulatedDevice(1e9)},
}
ON_A_DEVICE = ("qwen3moe, q4_k and q6_k", "gpt-oss, mxfp4", "deepseek2, q8_0")


@pytest.mark.parametrize(
    ("case", "place"),
    [*((case, "in RAM") for case in CASES), *itertools.product(ON_A_DEVICE, ("on a device", "beside a device"))],
)
def test_logits_and_ids_are_those_of_the_same_values(
    case: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    monkeypatch.setattr("offmoe.loader.build._gguf_dtype", lambda index: torch.float32)
    name, kinds = CASES[case]
    expected, path = make_model(name), tmp_path / "model.gguf"
    save_gguf(path, name, expected, kinds)
    ids = torch.randint(3, 100, (2, NUM_PROMPT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = expected(input_ids=ids).logits
    wanted_ids = expected.generate(ids[:1], max_new_tokens=NUM_NEW, do_sample=False)[0, NUM_PROMPT:].tolist()
    with load(path, ram="4GiB", expert_slots=4, **PLACES[place]()) as engine:
        with torch.no_grad():
            got = engine.model(input_ids=ids).logits
        measured(MODELS[name].family, "GGUF", got, wanted)
        reply = engine.generate(ids[0].tolist(), max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        assert list(reply.token_ids) == wanted_ids
        assert engine.stats()["misses"] > 0
        assert inspect_checkpoint(path).experts_total_bytes == engine._parts.experts.num_bytes


def test_the_tokenizer_and_its_chat_template_come_from_the_file(tmp_path: Path) -> None:
    path, folder = tmp_path / "model.gguf", demo_model_folder()
    save_gguf(path, "qwen3moe", make_model("qwen3moe", vocab_size=4096), {}, tokenizer=folder)
    ours, published = load_tokenizer(path, trust_remote_code=False), AutoTokenizer.from_pretrained(folder)
    assert ours is not None
    text = "def main() -> None:\n    '''Grüße, 12345 tabs\t'''<|end|>\n"
    assert ours(text)["input_ids"] == published(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    messages = [{"role": "user", "content": "hi"}]
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    assert ours.apply_chat_template(messages, **options) == published.apply_chat_template(messages, **options)


def test_the_advice_on_sampling_comes_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    advice = {"temp": 0.5, "top_k": 7, "top_p": 0.75, "min_p": 0.125, "penalty_repeat": 1.25}
    save_gguf(path, "qwen3moe", make_model("qwen3moe"), {}, sampling=advice)
    with load(path, ram="4GiB", expert_slots=4) as engine:
        config = engine.model.generation_config
        assert config is not None
        found = resolve_sampling(config)
        assert found == SamplingParams(temperature=0.5, top_k=7, top_p=0.75, min_p=0.125, repetition_penalty=1.25)
        assert resolve_sampling(config, temperature=0.0).temperature == 0
        prompt = [5, 6, 7]
        drawn = {tuple(engine.generate(prompt, max_new_tokens=8, seed=seed).token_ids) for seed in range(4)}
        assert len(drawn) > 1, "sampled"


@pytest.mark.parametrize(
    ("advice", "expected"),
    [
        ({}, {}),
        ({"temp": 0.0, "top_k": 20}, {"top_k": 20, "do_sample": False}),
        ({"top_p": 0.9}, {"top_p": 0.9, "do_sample": True}),
    ],
)
def test_advice_in_part(advice: dict[str, float], expected: dict[str, object]) -> None:
    metadata = {f"general.sampling.{key}": value for key, value in advice.items()}
    assert gguf_sampling(GgufHeader(metadata=metadata, tensors={})) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [("temp", float("nan")), ("temp", "hot"), ("top_k", 2.5), ("top_k", -1), ("top_p", 0.0), ("min_p", True)],
)
def test_advice_that_cannot_be_is_refused(key: str, value: object) -> None:
    header = GgufHeader(metadata={f"general.sampling.{key}": value}, tensors={})
    with pytest.raises(CheckpointError) as caught:
        gguf_sampling(header)
    assert f"general.sampling.{key} {value!r}; a number from" in one_line(caught)


def test_without_a_vocabulary_there_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(path, "qwen3moe", make_model("qwen3moe"), {})
    assert load_tokenizer(path, trust_remote_code=False) is None


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        ({}, torch.float32),
        (dict.fromkeys(("gate", "up", "down", "dense"), Type.F16), torch.bfloat16),  # float16 lacks the range
        (ALL_Q8, torch.bfloat16),
    ],
)
def test_it_computes_in_the_type_that_most_weights_have(
    kinds: dict[str, Type], dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(path, "qwen3moe", make_model("qwen3moe"), kinds)
    with load(path, ram="4GiB", expert_slots=4) as engine:
        assert engine.model.dtype == dtype


def test_parts_of_a_split_file_are_one_model(tmp_path: Path) -> None:
    whole, first = tmp_path / "model.gguf", tmp_path / "parts-00001-of-00003.gguf"
    save_gguf(whole, "llama", make_model("llama"), ALL_Q8)
    split_gguf(whole, first, num_parts=3)
    prompt = [5, 6, 7]
    replies = []
    for path in (whole, first):
        with load(path, ram="4GiB", expert_slots=4) as engine:
            replies.append(engine.generate(prompt, max_new_tokens=8, temperature=0, ignore_eos=True).token_ids)
    assert replies[0] == replies[1]
    (tmp_path / "parts-00002-of-00003.gguf").unlink()
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of 3 parts, first parts-00002-of-00003.gguf; download the rest"
    ):
        offmoe.load(first, ram="4GiB")
