"""Tokenizers made from GGUF metadata: every architecture runs, tokens that do something are read as themselves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gguf_makers
import pytest
from commands import fail, last_json, succeed
from gguf_makers import MODELS, make_model, save_gguf
from gguf_vocabularies import CONTROLS, USERS, MadeVocabulary, byte_pairs, pairs_by_score
from makers import one_line

import offmoe
from offmoe.checkpoint.gguf.vocabulary import read_vocabulary
from offmoe.core.errors import CheckpointError, UnsupportedModelError
from offmoe.hf.tokens.tokenizer import load_tokenizer

WORDS = ("\u2581th", "in", "\u2581a", "er", "\u2581the", "on", "\u2581w", "\u2581wor", "ld", "\u2581world", "or")
MERGES = ("\u0120 t", "\u0120t h", "i n", "\u0120th e", "e r", "\u0120 w", "o r", "\u0120w or", "l d", "\u0120wor ld")
KEYS: dict[str, Any] = {"add_bos_token": False}
TEXT = "in the world of 12 words"


def encode(path: Path, text: str) -> list[int]:
    tokenizer = load_tokenizer(path, trust_remote_code=False)
    assert tokenizer is not None
    return list(tokenizer(text)["input_ids"])


def save_model(path: Path, name: str, vocabulary: MadeVocabulary, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gguf_makers, "_write_tokenizer", lambda writer, folder: vocabulary.write(writer))
    save_gguf(path, name, make_model(name, vocab_size=len(vocabulary.tokens)), {})
    return path


@pytest.mark.parametrize(("name", "kind"), [*zip(MODELS, itertools.cycle(("gpt2", "llama")), strict=False)])
def test_every_architecture_runs_with_a_vocabulary(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = byte_pairs(MERGES, pre="deepseek-llm", **KEYS) if kind == "gpt2" else pairs_by_score(WORDS, **KEYS)
    path = save_model(tmp_path / "model.gguf", name, vocabulary, monkeypatch)
    with offmoe.load(path, ram="4GiB", expert_slots=4) as engine:
        ids = encode(path, TEXT)
        by_text = engine.generate(TEXT, max_new_tokens=4, temperature=0, ignore_eos=True)
        by_ids = engine.generate(ids, max_new_tokens=4, temperature=0, ignore_eos=True)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.stats.prompt_tokens == len(ids) < len(TEXT)


def test_commands_run_where_transformers_knows_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path / "model.gguf", "deepseek2", byte_pairs(MERGES, pre="deepseek-v3"), monkeypatch)
    room = ("--ram", "4GiB", "--expert-slots", "4", "--max-new-tokens", "4")
    assert last_json(succeed("generate", path, "--prompt", TEXT, *room, "--json").output)["stats"]["prompt_tokens"] > 4
    assert "cached output equals uncached output" in succeed("verify", path, "--prompt", TEXT, *room).output
    succeed("chat", path, *room, stdin="hi\n")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_control_and_user_defined_tokens_are_read_as_themselves(kind: str, tmp_path: Path) -> None:
    made = byte_pairs(MERGES, pre="gpt-2") if kind == "gpt2" else pairs_by_score(WORDS, **KEYS)
    path = made.save(tmp_path / "vocabulary.gguf")
    for token in (*CONTROLS, *USERS):
        assert encode(path, token) == [made.tokens.index(token)]
    tokenizer = load_tokenizer(path, trust_remote_code=False)
    assert tokenizer is not None
    inside = tokenizer(f"in{CONTROLS[2]}the<think>", add_special_tokens=False)["input_ids"]
    assert [made.tokens[idx] for idx in inside if idx >= len(made.tokens) - 6] == [CONTROLS[2], "<think>"]
    words = tokenizer(CONTROLS[2], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert made.tokens.index(CONTROLS[2]) not in words, "text where a caller says so"
    assert tokenizer.decode(words).strip() == CONTROLS[2]
    space = " " if kind == "llama" else ""  # as llama.cpp, after every such token
    assert tokenizer.decode(inside, skip_special_tokens=True).strip() == f"in{space}the<think>"
    letters = tokenizer("in\u00e9\u00e9\u00e9\u00e9er", add_special_tokens=False)["input_ids"]
    assert letters.count(made.tokens.index("\u00e9\u00e9")) == 2
    assert tokenizer.decode(letters).strip() == f"in\u00e9\u00e9\u00e9\u00e9{space}er", "letters, not the bytes E9"
    assert len(tokenizer) == len(made.tokens), "nothing was added beyond the vocabulary"


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = byte_pairs(MERGES, pre="gpt-2")
    monkeypatch.setattr(gguf_makers, "_write_tokenizer", lambda writer, folder: made.write(writer))
    path = tmp_path / "model.gguf"
    save_gguf(path, "qwen3moe", make_model("qwen3moe", vocab_size=100), {})
    message = fail("generate", path, "--prompt", "hi", "--ram", "4GiB")
    assert f"has a vocabulary of {len(made.tokens)} tokens, its token_embd.weight has 100 rows" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": {"eos_token_id": 151645}}, "says tokenizer.ggml.eos_token_id 151645, its vocabulary has 272 tokens"),
        ({"keys": {"add_bos_token": 1}}, "says tokenizer.ggml.add_bos_token 1; true or false is needed"),
        ({"tokens": ["a"] * 272}, "has the token 'a' twice, as 0 and 271"),
        ({"types": [1, 1]}, "has 2 items of tokenizer.ggml.token_type for 272 tokens"),
        ({"merges": ["ab"]}, "merge 0 is 'ab', two parts with a space between are needed"),
        ({"merges": ["i q"]}, "cannot be read: Error while initializing BPE: Token `iq` out of vocabulary"),
        ({"merges": None}, "it has no tokenizer.ggml.merges"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = byte_pairs(MERGES, pre="gpt-2")
    path = MadeVocabulary(**(vars(made) | change)).save(tmp_path / "vocabulary.gguf")
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(path, trust_remote_code=False)
    assert message in one_line(caught)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "brand-new"}, "splits text into words by the rule 'brand-new', which is not known here"),
        ({"kind": "bert"}, "has a tokenizer of kind 'bert', which is not read (known: gpt2, llama, gemma4)"),
    ],
)
def test_what_is_not_known_is_refused_by_its_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = MadeVocabulary(**(vars(byte_pairs(MERGES, pre="gpt-2")) | change)).save(tmp_path / "vocabulary.gguf")
    with pytest.raises(UnsupportedModelError) as caught:
        load_tokenizer(path, trust_remote_code=False)
    assert message in one_line(caught)


HARMONY = ("<|return|>", "<|call|>", "<|end|>", "<|endoftext|>", "<|channel|>")


@pytest.mark.parametrize(
    ("controls", "keys", "ends"),
    [
        (("<|im_start|>", "<|im_end|>", "<|endoftext|>"), {"eos_token_id": "<|endoftext|>"}, {1, 2}),
        (("<stop-here>", "<turn-over>"), {"eos_token_id": "<stop-here>", "eot_token_id": "<turn-over>"}, {0, 1}),
        (("<|eom_id|>", "<x>"), {"eos_token_id": "<x>", "eom_token_id": "<|eom_id|>"}, {0, 1}),
        (HARMONY, {"eos_token_id": "<|return|>"}, {0, 1, 3}),
        (("<|end|>", "<|endoftext|>"), {}, {0, 1}),
        (("<|file_sep|>", "<|repo_name|>", "<|fim_pad|>", "<|fim_middle|>"), {}, {0, 1, 2}),
        (("<a>", "<b>"), {"eos_token_id": (1 << 32) - 1}, set()),
    ],
)
def test_end_tokens_are_those_of_keys_and_known_names(
    controls: tuple[str, ...], keys: dict[str, Any], ends: set[int], tmp_path: Path
) -> None:
    first = 256 + len(MERGES)
    ids = {key: first + controls.index(value) if isinstance(value, str) else value for key, value in keys.items()}
    path = byte_pairs(MERGES, pre="gpt-2", controls=controls, users=(), **ids).save(tmp_path / "vocabulary.gguf")
    vocabulary = read_vocabulary(path)
    assert vocabulary is not None
    assert vocabulary.end_ids() == [first + idx for idx in sorted(ends)]


def test_html_is_no_end_and_a_reply_ends_at_every_end_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merges = [*MERGES, "< /", "</ s", "</s >"]
    made = byte_pairs(merges, pre="qwen2", controls=("<|im_end|>", "<|endoftext|>"), users=())
    path = save_model(tmp_path / "model.gguf", "qwen3moe", made, monkeypatch)
    with offmoe.load(path, ram="4GiB", expert_slots=4) as engine:
        assert engine.model.generation_config is not None
        assert engine.model.generation_config.eos_token_id == [269, 270]
        replied = engine.generate("in", max_new_tokens=8, temperature=0, ignore_eos=True).token_ids
    made = byte_pairs(merges, pre="qwen2", controls=("<|im_end|>", "<|endoftext|>"), users=(), eot_token_id=replied[3])
    path = save_model(tmp_path / "other.gguf", "qwen3moe", made, monkeypatch)
    with offmoe.load(path, ram="4GiB", expert_slots=4) as engine:
        reply = engine.generate("in", max_new_tokens=8, temperature=0)
    assert (reply.finish_reason, len(reply.token_ids)) == ("stop", replied.index(replied[3]))
