"""Traces to compare policies on: a model that writes about mixed prompts, or one that is given real text."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import offmoe
from offmoe.trace.file import TraceHeader
from offmoe.trace.recorder import TraceEvent

# Of the demo model's prompts: tokens, and new tokens at least and at most.
PROMPT_TOKENS, FEWEST_NEW, MOST_NEW = 64, 64, 384


def mixed_prompts(seed: int) -> Iterator[str]:
    """Held-out documents of every kind in turn, without end: prose, code, help pages, conversations."""
    from demo_corpus import KINDS, load_documents

    rng = random.Random(seed)
    texts = {kind: [doc.text for doc in load_documents(seed=0) if doc.held_out and doc.kind == kind] for kind in KINDS}
    while True:
        for kind in KINDS:
            yield rng.choice(texts[kind])


def record_generated(model: Path, path: Path, *, num_tokens: int, seed: int = 0, **options: Any) -> None:
    """Sampled replies (temperature 1) of at least `num_tokens` tokens in all, to mixed prompts."""
    rng, done = random.Random(seed), 0
    with offmoe.load(model, **options) as engine, engine.trace(path, guesses=False):
        assert engine.tokenizer is not None
        for number, text in enumerate(mixed_prompts(seed)):
            ids = engine.tokenizer(text)["input_ids"][:PROMPT_TOKENS]
            reply = engine.generate(
                ids, max_new_tokens=rng.randint(FEWEST_NEW, MOST_NEW), temperature=1.0, seed=number, ignore_eos=True
            )
            done += len(reply.token_ids)
            print(f"{done} of {num_tokens} tokens", file=sys.stderr, end="\r")
            if done >= num_tokens:
                break
    print(file=sys.stderr)


def record_given(model: Path, path: Path, *, num_tokens: int, **options: Any) -> None:
    """The first of the ids beside the checkpoint, read as one prompt: `token_calls` makes single tokens of it."""
    ids = json.loads((model / "ids.json").read_text())[:num_tokens]
    with (
        offmoe.load(model, context_length=len(ids) + 1, prefetch="off", **options) as engine,
        engine.trace(path, guesses=False),
    ):
        engine.generate(
            ids, max_new_tokens=1, ignore_eos=True,
            on_prefill=lambda done, total: print(f"{done} of {total} tokens", file=sys.stderr, end="\r"),
        )  # fmt: skip
    print(file=sys.stderr)


def token_calls(events: Sequence[TraceEvent], num_layers: int) -> list[TraceEvent]:
    """Prompts' calls taken apart: token after token, layer after layer, as if the same tokens had been decoded."""
    calls: list[TraceEvent] = []
    for begin in range(0, len(events), num_layers):
        layers = events[begin : begin + num_layers]
        for token in range(layers[0].num_tokens):
            for event in layers:
                ids = event.ids[token * event.top_k : (token + 1) * event.top_k]
                calls.append(TraceEvent(event.layer_idx, event.top_k, False, ids))
    return calls


def deeper(header: TraceHeader, events: Sequence[TraceEvent], times: int) -> tuple[TraceHeader, list[TraceEvent]]:
    """A model of `times` as many layers, in which every group of as many layers as there were chooses alike."""
    num_layers, repeated = header.num_layers, list[TraceEvent]()
    for begin in range(0, len(events), num_layers):
        for number in range(times):
            repeated += [
                dataclasses.replace(event, layer_idx=event.layer_idx + number * num_layers)
                for event in events[begin : begin + num_layers]
            ]
    return (
        dataclasses.replace(
            header, experts_per_layer=header.experts_per_layer * times, expert_bytes=header.expert_bytes * times
        ),
        repeated,
    )
