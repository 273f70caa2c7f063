"""Writes the demo model's folder: weights, configuration, tokenizer, and a card of what was measured on them."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from demo_card import Card, Recipe, write_card
from demo_corpus import Document
from demo_eval import measure, sample_answers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

log = logging.getLogger("train_demo")


def save_model(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes weights (rounded to bf16, which changes `model`), configuration and tokenizer to `folder`."""
    model_as_any: Any = model
    model_as_any.config.output_router_logits = False
    stop: dict[str, Any] = {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id}
    model_as_any.generation_config = GenerationConfig.from_dict(stop)
    model_as_any.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    make_portable(folder)


def make_portable(folder: Path) -> None:
    """Adds the published spellings that transformers 5 no longer writes and other readers (and transformers 4) need."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_experts": config["num_local_experts"], "rope_theta": config["rope_parameters"]["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)


def export(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[Document],
    recipe: Recipe,
    out: Path,
) -> None:
    """Writes the bf16 model, measures it as written, adds the card, then puts the folder in place of `out`.

    A reader of `out` sees the old folder or the new one, never half of one.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        save_model(model, tokenizer, folder)
        written: Any = Qwen3MoeForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="grouped_mm"
        )
        written.eval()
        losses, routing = measure(written, tokenizer, documents)
        samples = sample_answers(written, tokenizer)
        write_card(
            folder, Card(recipe=recipe, model=written, losses=losses, routing=routing, samples=samples), documents
        )
        folder.chmod(0o755)
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size_bytes = sum(path.stat().st_size for path in out.iterdir())
    log.info("wrote %s: %.2f MB, held-out %.3f nats per token", out, size_bytes / 1e6, losses["all"].nats_per_token)
