"""A tokenizer trained on the text that every Python installation carries, and held-out ids of that text.

Random weights need no good text, but routing does depend on ids: repeated words give the locality of real prompts
that uniform random ids lack. The language reference in `pydoc_data` is prose; every eighth topic is held out.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(vocab_size: int, *, max_source_bytes: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` entries on the sources and the topics not held out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for idx, (_, text) in enumerate(sorted(topics.items())) if idx % 8]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*/**/*.py")):
        if "site-packages" not in path.parts and max_source_bytes > 0:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            max_source_bytes -= len(texts[-1])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def held_out_ids(tokenizer: Tokenizer) -> list[int]:
    """Token ids of the held-out topics, one after the other."""
    text = "\n\n".join(text for idx, (_, text) in enumerate(sorted(topics.items())) if idx % 8 == 0)
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def save_tokenizer(tokenizer: Tokenizer, out_dir: Path) -> None:
    """Write the files `AutoTokenizer.from_pretrained(out_dir)` reads."""
    make_fast: Any = PreTrainedTokenizerFast  # untyped in transformers
    fast = make_fast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
    fast.save_pretrained(out_dir)
