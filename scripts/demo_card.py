"""Writes the demo model's card (README.md) from what a training run measured."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from demo_corpus import HELD_OUT_PERCENT, Document
from demo_eval import WINDOW, LayerRouting, Loss
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

FRONT_MATTER = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
"""

INTERIM = "**Interim: written from a checkpoint of a run that had not ended.**\n"

MODEL = """\
# The offmoe demo model

A small Mixture-of-Experts language model in the Qwen3-MoE layout, trained from scratch on text that every Python
installation carries. It lets `offmoe` show a real router and real experts without a download. The files take
{size_mb:.1f} MB.

| | |
|---|---|
| parameters | {num_parameters:,} ({num_active:,} at work for one token) |
| layers, hidden size | {config.num_hidden_layers}, {config.hidden_size} |
| experts | {config.num_experts} a layer, top {config.num_experts_per_tok} |
| expert's intermediate size | {config.moe_intermediate_size} |
| attention | {config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} key-value heads |
| positions | RoPE, theta {rope_theta:g} |
| vocabulary | {config.vocab_size}, byte-level BPE |
| context | {config.max_position_embeddings} in the configuration, trained up to {longest_window} |
"""

DATA = """\
## Data

The standard library of CPython {python}, nothing else: source files, docstrings (those of compiled modules
too) as prose, the pages behind
`help("topic")`, and the same docstrings and topics put as questions and answers from templates. About
{held_out_percent}% of the files and topics, picked by a hash of their names, are held out of training and of the
tokenizer.

| kind | training documents | share of the training windows | held-out documents |
|---|---:|---:|---:|
{rows}
"""

TRAINING = """\
## Training

| | |
|---|---|
| steps, tokens | {recipe.num_steps:,} steps, {recipe.num_tokens:,} tokens |
| wall-clock time | {minutes:.1f} minutes of {planned:.1f} planned |
| speed | {tokens_per_s:,.0f} tokens/s on average, at most {recipe.num_threads} CPU threads, no GPU |
| batch, windows x tokens | {schedule} of the time |
| optimizer | AdamW, learning rate {recipe.peak_learning_rate:g}, cosine over wall-clock time |
| arithmetic | bf16 autocast over fp32 weights |
| load balancing | {aux:g} times the Switch loss, layer by layer |
| software | Python {python}, torch {torch_version}, transformers {transformers_version} |
| seed | {recipe.seed} |

This trains it again:

    python scripts/train_demo.py --minutes {planned:g} --threads {recipe.num_threads} --seed {recipe.seed}

The learning rate follows the clock, so another machine makes another number of steps, and another Python version brings
another text; the figures will be near these, the weights will differ.
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
class Recipe:
    """How a run was made and how far it came; `schedule` has (progress, window, tokens per step)."""

    seed: int
    num_threads: int
    kind_shares: dict[str, float]
    schedule: tuple[tuple[float, int, int], ...]
    peak_learning_rate: float
    num_steps: int
    num_tokens: int
    elapsed_s: float
    planned_s: float

    @property
    def is_interim(self) -> bool:
        return self.elapsed_s < 0.99 * self.planned_s


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card reports on: every figure in it comes from here or from the documents."""

    recipe: Recipe
    model: Qwen3MoeForCausalLM
    losses: dict[str, Loss]
    routing: list[LayerRouting]
    samples: list[tuple[str, str]]


def num_active_parameters(config: Qwen3MoeConfig, num_parameters: int) -> int:
    """All parameters less those of the experts a token does not visit."""
    num_idle_experts = config.num_experts - config.num_experts_per_tok
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    return num_parameters - int(config.num_hidden_layers * num_idle_experts * per_expert)


def data_rows(documents: list[Document], kind_shares: dict[str, float]) -> str:
    rows = []
    for kind, share in kind_shares.items():
        held_out = [document.held_out for document in documents if document.kind == kind]
        rows.append(f"| {kind} | {len(held_out) - sum(held_out):,} | {share:.0%} | {sum(held_out):,} |")
    return "\n".join(rows)


def loss_rows(losses: dict[str, Loss]) -> str:
    return "\n".join(
        f"| {kind} | {x.num_tokens:,} | {x.nats_per_token:.3f} | {x.nats_per_byte:.3f} | {x.bits_per_byte:.3f} |"
        for kind, x in losses.items()
    )


def routing_rows(routing: list[LayerRouting]) -> str:
    return "\n".join(
        f"| {i} | {layer.busiest_over_fair:.2f} | {layer.quietest_over_fair:.2f} | {layer.num_experts_for_80_percent} |"
        for i, layer in enumerate(routing)
    )


def quoted(question: str, answer: str) -> str:
    return f"**{question}**\n\n```text\n{answer.replace('```', '` ` `').strip()}\n```"


def training_section(recipe: Recipe, config: Qwen3MoeConfig) -> str:
    return TRAINING.format(
        recipe=recipe,
        aux=config.router_aux_loss_coef,
        schedule=", ".join(
            f"{num_tokens // length} x {length} from {since:.0%}" for since, length, num_tokens in recipe.schedule
        ),
        minutes=recipe.elapsed_s / 60,
        planned=recipe.planned_s / 60,
        tokens_per_s=recipe.num_tokens / max(recipe.elapsed_s, 1.0),
        python=platform.python_version(),
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
    )


def model_section(model: Qwen3MoeForCausalLM, *, size_bytes: int, longest_window: int) -> str:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    rope: Any = model.config.rope_parameters
    return MODEL.format(
        size_mb=size_bytes / 1e6,
        num_parameters=num_parameters,
        num_active=num_active_parameters(model.config, num_parameters),
        config=model.config,
        rope_theta=rope["rope_theta"],
        longest_window=longest_window,
    )


def write_card(folder: Path, card: Card, documents: list[Document]) -> None:
    """Writes `folder/README.md`; call it last, for it states the size of the files beside it."""
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    config, recipe = card.model.config, card.recipe
    data = DATA.format(
        python=platform.python_version(),
        held_out_percent=HELD_OUT_PERCENT,
        rows=data_rows(documents, recipe.kind_shares),
    )
    measured = MEASURED.format(
        window=WINDOW,
        losses=loss_rows(card.losses),
        num_experts=config.num_experts,
        even=math.ceil(0.8 * config.num_experts),
        routing=routing_rows(card.routing),
    )
    parts = [
        FRONT_MATTER,
        *([INTERIM] if recipe.is_interim else []),
        model_section(
            card.model, size_bytes=size_bytes, longest_window=max(length for _, length, _ in recipe.schedule)
        ),
        data,
        training_section(recipe, config),
        measured,
        SAMPLES.format(samples="\n\n".join(quoted(*sample) for sample in card.samples)),
        LIMITS,
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")
