"""The ids of llama.cpp, for every rule that cuts text into words, on vocabularies whose merges cross every border.

gguf_ids.json: small vocabularies, texts, and what llama.cpp 0c1e57098 (in llama-cpp-python 0.3.36) made of them. A text
has the ids that differ, and a letter for each rule that says which of them (a is the first).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from gguf_vocabularies import byte_pairs, pairs_by_score

from offmoe.checkpoint.gguf.splits import SPLITTINGS, find_splitting
from offmoe.checkpoint.gguf.vocabulary import Vocabulary, read_vocabulary
from offmoe.hf.tokens.gguf_tokenizer import make_tokenizer

PINNED = json.loads((Path(__file__).parent / "gguf_ids.json").read_text())
TEXTS = [entry["text"] for entry in PINNED["texts"]]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("gguf") / "vocabulary.gguf"
    made = byte_pairs(PINNED["merges"], pre="gpt-2", controls=(), users=(), add_bos_token=False)
    found = read_vocabulary(made.save(path))
    assert found is not None
    return found


def wrong(vocabulary: Vocabulary, expected: list[list[int]]) -> list[tuple[str, list[str], list[str]]]:
    """Texts with other ids than expected, and both as tokens."""
    ids: Any = make_tokenizer(vocabulary)(TEXTS)["input_ids"]
    return [
        (text, [vocabulary.tokens[idx] for idx in got], [vocabulary.tokens[idx] for idx in want])
        for text, got, want in zip(TEXTS, ids, expected, strict=True)
        if got != want
    ]


@pytest.mark.parametrize(("number", "name"), [*enumerate(PINNED["rules"])])
def test_each_rule_gives_the_ids_of_llama_cpp(number: int, name: str, vocabulary: Vocabulary) -> None:
    expected = [entry["ids"][ord(entry["which"][number]) - ord("a")] for entry in PINNED["texts"]]
    assert wrong(dataclasses.replace(vocabulary, splitting=name), expected) == []


def test_pairs_by_score_give_the_ids_of_llama_cpp(tmp_path: Path) -> None:
    path = pairs_by_score(PINNED["words"], add_bos_token=False).save(tmp_path / "vocabulary.gguf")
    found = read_vocabulary(path)
    assert found is not None
    assert wrong(found, [entry["by_score"] for entry in PINNED["texts"]]) == []


def test_every_rule_is_pinned_by_one_of_its_names() -> None:
    pinned = {(SPLITTINGS[name].patterns, SPLITTINGS[name].whole_words) for name in PINNED["rules"]}
    assert pinned == {(rule.patterns, rule.whole_words) for rule in SPLITTINGS.values() if not rule.is_raw}


def test_a_file_that_names_no_rule_has_the_default_one() -> None:
    assert find_splitting(None) == SPLITTINGS["default"]


def test_whole_words_that_are_tokens_need_no_merges(tmp_path: Path) -> None:
    """Llama 3's: `ab` and `abc` come of merges, `cab` of none; llama.cpp takes a word that is a token as it is."""
    made = byte_pairs(["a b", "ab c"], pre="llama-bpe", controls=("<s>",), users=(), bos_token_id=258)
    tokens = [*made.tokens, "cab"]
    types = [*made.types, 1]
    for pre, expected in (("llama-bpe", [258, 259]), ("qwen2", [ord("c"), 256])):
        path = dataclasses.replace(made, tokens=tokens, types=types, pre=pre).save(tmp_path / f"{pre}.gguf")
        found = read_vocabulary(path)
        assert found is not None
        assert make_tokenizer(found)("cab")["input_ids"] == expected
