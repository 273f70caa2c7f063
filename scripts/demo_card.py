"""Writes the demo model's card (README.md) from what a training run measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from demo_corpus import Document
from demo_eval import LayerRouting, Loss
from transformers import Qwen3MoeConfig

FRONT_MATTER = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
"""

WHAT_IT_IS = """\
# The offmoe demo model

A small Mixture-of-Experts language model in the Qwen3-MoE layout, trained from scratch on text that every Python
installation carries. It lets `offmoe` show a real router and real experts without a download. {size}

| | |
|---|---|
| parameters | {num_parameters:,} ({num_active:,} at work for one token) |
| layers, hidden size | {config.num_hidden_layers}, {config.hidden_size} |
| experts | {config.num_experts} a layer, top {config.num_experts_per_tok}, intermediate size {config.moe_intermediate_size} |
| attention | {config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} key-value heads, RoPE theta {rope_theta:g} |
| vocabulary | {config.vocab_size}, byte-level BPE |
| context | {config.max_position_embeddings} in the configuration, trained up to {max_length} |
"""

DATA = """\
## Data

The standard library of CPython {python}, nothing else: source files, their docstrings as prose, the pages behind
`help("topic")`, and the same docstrings and topics put as questions and answers from templates. {held_out_percent}% of the files and
topics, picked by a hash of their names, are held out of training and of the tokenizer.

| kind | training documents | share of the training windows | held-out documents |
|---|---:|---:|---:|
{rows}
"""

TRAINING = """\
## Training

| | |
|---|---|
| steps, tokens | {card.num_steps:,} steps, {card.num_tokens:,} tokens |
| wall-clock time | {minutes:.1f} minutes of {planned:.1f} planned, {tokens_per_s:,.0f} tokens/s, {card.num_threads} CPU threads, no GPU |
| software | Python {card.python}, torch {torch_version}, transformers {transformers_version} |
| seed | {card.seed} |

`python scripts/train_demo.py --minutes {planned:g} --threads {card.num_threads} --seed {card.seed}` trains it again. The learning rate follows the clock, so
another machine makes another number of steps and another Python version brings another text; the figures will be near
these, the weights will differ.
"""

MEASURED = """\
## Held-out loss

Measured on the weights as written (bf16 values, fp32 arithmetic), windows of {window} tokens.

| kind | tokens | nats/token | nats/byte | bits/byte |
|---|---:|---:|---:|---:|
{losses}

## Routing on held-out text

The busiest and the quietest expert's share of the assignments, in multiples of an even share, and how many of the
{num_experts} experts take 80% of the assignments (an even router would need {even}).

| layer | busiest | quietest | experts for 80% |
|---:|---:|---:|---:|
{routing}
"""

SAMPLES = """\
## Greedy answers

{samples}
"""

LIMITS = """\
## Limits

A toy. It writes text that looks like docstrings and Python; it knows few facts, and states wrong ones as readily as
right ones. Use it to see experts move, never for answers.

## Licence

The weights are under Apache-2.0. The training text is the Python standard library, (c) Python Software Foundation,
under the PSF License Version 2; passages the model repeats from it stay under that licence.
"""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a run measured; everything in the card that is a figure comes from here, the configuration or the data."""

    num_steps: int
    num_tokens: int
    elapsed_s: float
    planned_s: float
    seed: int
    num_threads: int
    python: str
    num_parameters: int
    losses: dict[str, Loss]
    routing: list[LayerRouting]
    samples: list[tuple[str, str]]

    @property
    def is_interim(self) -> bool:
        return self.elapsed_s < 0.99 * self.planned_s


def num_active_parameters(config: Qwen3MoeConfig, num_parameters: int) -> int:
    """All parameters less those of the experts a token does not visit."""
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    return num_parameters - config.num_hidden_layers * (config.num_experts - config.num_experts_per_tok) * per_expert


def data_rows(documents: list[Document], kind_shares: dict[str, float]) -> str:
    rows = []
    for kind, share in kind_shares.items():
        held_out = [document.held_out for document in documents if document.kind == kind]
        rows.append(f"| {kind} | {len(held_out) - sum(held_out):,} | {share:.0%} | {sum(held_out):,} |")
    return "\n".join(rows)


def loss_rows(losses: dict[str, Loss]) -> str:
    return "\n".join(
        f"| {kind} | {loss.num_tokens:,} | {loss.nats_per_token:.3f} | {loss.nats_per_byte:.3f} | {loss.bits_per_byte:.3f} |"
        for kind, loss in losses.items()
    )


def routing_rows(routing: list[LayerRouting]) -> str:
    return "\n".join(
        f"| {i} | {layer.busiest_over_fair:.2f} | {layer.quietest_over_fair:.2f} | {layer.num_experts_for_80_percent} |"
        for i, layer in enumerate(routing)
    )


def quoted(question: str, answer: str) -> str:
    return f"**{question}**\n\n```text\n{answer.replace('```', '` ` `').strip()}\n```"


def write_card(
    folder: Path,
    card: Card,
    documents: list[Document],
    *,
    config: Qwen3MoeConfig,
    kind_shares: dict[str, float],
    max_length: int,
    window: int,
    held_out_percent: int,
) -> None:
    """Writes `folder/README.md`; call it last, for it states the size of the files beside it."""
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    interim = "**Interim: written from a checkpoint of a run that had not ended.**\n" if card.is_interim else ""
    what = WHAT_IT_IS.format(
        size=f"The files take {size_bytes / 1e6:.1f} MB.",
        num_parameters=card.num_parameters,
        num_active=num_active_parameters(config, card.num_parameters),
        config=config,
        rope_theta=config.rope_parameters["rope_theta"],
        max_length=max_length,
    )
    data = DATA.format(python=card.python, held_out_percent=held_out_percent, rows=data_rows(documents, kind_shares))
    training = TRAINING.format(
        card=card,
        minutes=card.elapsed_s / 60,
        planned=card.planned_s / 60,
        tokens_per_s=card.num_tokens / max(card.elapsed_s, 1.0),
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
    )
    measured = MEASURED.format(
        window=window,
        losses=loss_rows(card.losses),
        num_experts=config.num_experts,
        even=-(-config.num_experts * 8 // 10),
        routing=routing_rows(card.routing),
    )
    samples = SAMPLES.format(samples="\n\n".join(quoted(*sample) for sample in card.samples))
    parts = [part for part in (interim, what, data, training, measured, samples, LIMITS) if part]
    (folder / "README.md").write_text(FRONT_MATTER + "\n" + "\n".join(parts), encoding="utf-8")
