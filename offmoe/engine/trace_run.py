"""Goes through prompts and records what the routers choose."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offmoe.core.errors import ContextLengthError
from offmoe.engine.engine import Engine
from offmoe.engine.prompt import encode_prompt
from offmoe.machine.costs import TokenSample

_COUNTED = ("disk_stall_ns", "disk_bytes", "waiting_calls")


def encode_all(engine: Engine, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Token ids of every prompt. Raises UsageError, or ContextLengthError naming the prompt that has no room."""
    ids = [encode_prompt(prompt, engine.tokenizer, vocab_size=engine.vocab_size) for prompt in prompts]
    for number, one in enumerate(ids, start=1):
        if len(one) >= engine.context_length:
            raise ContextLengthError(
                f"prompt {number} has {len(one)} tokens, the context {engine.context_length}; raise --context-length, "
                "or shorten it"
            )
    return ids


def record_prompts(
    engine: Engine, prompts: Sequence[Sequence[int]], path: Path, *, max_new_tokens: int, guesses: bool,
    about: dict[str, Any], sampling: dict[str, Any], overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TokenSample]:  # fmt: skip
    """Generate from each of `prompts` and write the routing to `path`; returns what each decoded token cost.

    Every prompt gets `max_new_tokens` at most, also past the model's end token: a trace is to be as long as was asked
    for. A seed is raised by one for each prompt. `progress(done, total)` in tokens. `about` goes into the header.
    """
    samples: list[TokenSample] = []
    total, done = len(prompts) * max_new_tokens, 0
    about = {"count": len(prompts), "max_new_tokens": max_new_tokens, **sampling, **about}
    with engine.trace(path, prompts=about, guesses=guesses, overwrite=overwrite):
        for number, ids in enumerate(prompts):
            seed = {"seed": sampling["seed"] + number} if sampling.get("seed") is not None else {}
            chunks = engine.stream(
                ids, **{**sampling, **seed}, max_new_tokens=max_new_tokens, ignore_eos=True, reuse=False
            )
            stats, begin = engine.stats(), time.perf_counter()
            for count, chunk in enumerate(chunks):
                step_s, before, stats = time.perf_counter() - begin, stats, engine.stats()
                if count and chunk.token_ids:
                    stall_ns, fetched, waiting = (stats[name] - before[name] for name in _COUNTED)
                    samples.append(TokenSample(step_s, stall_ns / 1e9, fetched, waiting))
                progress(min(total, done + count + 1), total)
                begin = time.perf_counter()
            done += max_new_tokens  # a full context may have ended it earlier
    return samples
