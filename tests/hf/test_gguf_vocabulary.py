"""Vocabularies of GGUF files: long lists by byte range, split files, and the memory that a plan counts for them."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf_makers
import pytest
from commands import last_json, succeed
from gguf_makers import make_model, save_gguf
from gguf_parts import split_gguf
from gguf_vocabularies import byte_pairs, pairs_by_score
from makers import one_line

from offmoe.checkpoint.gguf.header import MAX_KEPT_ITEMS
from offmoe.checkpoint.gguf.vocabulary import read_vocabulary
from offmoe.core.errors import CheckpointError
from offmoe.hf.tokens.tokenizer import load_tokenizer

# Three letters each, so that a merge is two letters and one: more than a header keeps.
PAIRS = [f"{first} {second}" for first in "abcdefghijklmnopqrstuvwxyz" for second in "abcdefghijklmnopqrstuvwxyz"]
TRIPLES = [f"{pair.replace(' ', '')} {letter}" for pair in PAIRS for letter in "aeiouxyz"]
MERGES = PAIRS + TRIPLES


def test_long_lists_are_read_whole(tmp_path: Path) -> None:
    made = byte_pairs(MERGES, pre="gpt-2")
    assert len(made.tokens) > MAX_KEPT_ITEMS < len(made.merges or ())
    found = read_vocabulary(made.save(tmp_path / "vocabulary.gguf"))
    assert found is not None
    assert (found.tokens, found.merges, list(found.types)) == (made.tokens, MERGES, made.types)
    words = [f"\u2581{merge.replace(' ', '')}" for merge in TRIPLES]
    scored = pairs_by_score(words)
    found = read_vocabulary(scored.save(tmp_path / "scored.gguf"))
    assert found is not None
    assert (found.tokens, list(found.scores)) == (scored.tokens, scored.scores)


def test_a_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = byte_pairs(MERGES, pre="gpt-2").save(tmp_path / "vocabulary.gguf")
    data = path.read_bytes()
    at = data.index(struct.pack("<Q", 3) + b"zzx") + 8
    path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    with pytest.raises(CheckpointError) as caught:
        read_vocabulary(path)
    assert "has a token or merge that is no UTF-8 (number 6337)" in one_line(caught)


def test_a_list_that_ends_early_is_refused(tmp_path: Path) -> None:
    path = byte_pairs(MERGES, pre="gpt-2").save(tmp_path / "vocabulary.gguf")
    data = path.read_bytes()
    at = data.index(struct.pack("<Q", 3) + b"zzx")
    path.write_bytes(data[:at] + struct.pack("<Q", 1 << 20) + data[at + 8 :])
    with pytest.raises(CheckpointError) as caught:
        read_vocabulary(path)
    assert "a text claims 1048576 bytes" in one_line(caught)


def test_the_plan_counts_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = byte_pairs(MERGES, pre="gpt-2")
    model = make_model("qwen3moe", vocab_size=len(made.tokens), hidden_size=64)
    plain, path = tmp_path / "plain.gguf", tmp_path / "model.gguf"
    save_gguf(plain, "qwen3moe", model, {})
    monkeypatch.setattr(gguf_makers, "_write_tokenizer", lambda writer, folder: made.write(writer))
    save_gguf(path, "qwen3moe", model, {})
    taken = [last_json(succeed("plan", name, "--json").stdout)["memory"]["runtime_bytes"] for name in (plain, path)]
    assert taken[1] - taken[0] == 150 * (len(made.tokens) + len(MERGES))


def test_the_first_part_of_a_split_file_has_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = byte_pairs(PAIRS, pre="gpt-2")
    monkeypatch.setattr(gguf_makers, "_write_tokenizer", lambda writer, folder: made.write(writer))
    whole, first = tmp_path / "model.gguf", tmp_path / "parts-00001-of-00003.gguf"
    save_gguf(whole, "llama", make_model("llama", vocab_size=len(made.tokens)), {})
    split_gguf(whole, first, num_parts=3)
    found = read_vocabulary(first)
    assert found is not None
    assert found.num_rows == len(made.tokens) == len(found.tokens)
    tokenizer = load_tokenizer(first, trust_remote_code=False)
    assert tokenizer is not None
    assert tokenizer("abzz")["input_ids"] == [256 + PAIRS.index("a b"), 256 + PAIRS.index("z z")]
