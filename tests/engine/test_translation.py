"""Encoder-decoder models from text to text, with tokenizers of their own kinds: the words of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_families import build_adapted, nllb_as_published
from families import save_layout
from places import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, NllbTokenizer, PreTrainedTokenizerBase, T5Tokenizer
from transformers.models.nllb_moe import modeling_nllb_moe

import offmoe

TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()
PROMPT = "The Work shall mean any form"
VOCAB_SIZE, NUM_NEW = 128, 24  # the tiny models' vocabulary


def t5_tokenizer() -> PreTrainedTokenizerBase:
    """Unigram pieces, as T5 and Switch have; an end of sentence after the source."""
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_SIZE - 4, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    pieces = trained(Tokenizer(models.Unigram()), trainer)["vocab"]
    return T5Tokenizer(vocab=[tuple(piece) for piece in pieces], extra_ids=VOCAB_SIZE - len(pieces))


def nllb_tokenizer() -> PreTrainedTokenizerBase:
    """Byte pairs with languages: that of the source before it, an end of sentence after it."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 8, special_tokens=special, show_progress=False)
    model = trained(Tokenizer(models.BPE(unk_token="<unk>")), trainer)
    return NllbTokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], src_lang="eng_Latn",
        tgt_lang="deu_Latn", extra_special_tokens=["eng_Latn", "deu_Latn"],
    )  # fmt: skip


def trained(tokenizer: Tokenizer, trainer: Any) -> dict[str, Any]:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(TEXT, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


@pytest.mark.parametrize(
    ("name", "make"), [("switch_transformers", t5_tokenizer), ("nllb_moe", nllb_tokenizer)], ids=["switch", "nllb"]
)
def test_text_becomes_transformers_text(
    name: str, make: Callable[[], PreTrainedTokenizerBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_nllb_moe.NllbMoeExperts, "forward", nllb_as_published)
    model: Any = build_adapted(name)
    save_layout(model, tmp_path, "published")
    make().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    target = tokenizer.convert_tokens_to_ids("deu_Latn") if name == "nllb_moe" else None
    source = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert source[0, -1] == tokenizer.eos_token_id
    options: dict[str, Any] = {"max_new_tokens": NUM_NEW, "do_sample": False, "num_beams": 1, "eos_token_id": None}
    with torch.inference_mode():
        expected_ids = model.generate(source, forced_bos_token_id=target, **options)[0, 1:]
    expected = tokenizer.decode(expected_ids, skip_special_tokens=True)
    assert len(set(expected_ids.tolist())) > 2 and expected
    with offmoe.load(tmp_path, ram="4GiB", expert_slots=6) as engine:
        engine.model.generation_config.forced_bos_token_id = target
        reply = engine.generate(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        assert (list(reply.token_ids), reply.text) == (expected_ids.tolist(), expected)
        pieces = engine.stream(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        assert "".join(piece.text for piece in pieces) == expected
