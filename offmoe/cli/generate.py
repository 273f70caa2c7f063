"""`offmoe generate`: a prompt's continuation, streamed, and what it cost."""

from __future__ import annotations

from typing import Any

import click

from offmoe.cli.options import verbosity
from offmoe.cli.session import PromptProgress, open_engine, print_stream, say_figures


def run_generate(
    model: str | None, engine_given: dict[str, Any], options: dict[str, Any], prompt: str, *, quiet: bool
) -> dict[str, Any]:
    """Stream to stdout, statistics to stderr. `quiet`: nothing is printed; returns the record instead."""
    with open_engine(model, engine_given, quiet=quiet, prompt=prompt) as engine:
        if quiet:
            reply = engine.generate(prompt, **options)
            return {
                "text": reply.text, "token_ids": reply.token_ids, "finish_reason": reply.finish_reason,
                "stats": reply.stats.as_dict(), "engine": engine.stats().as_dict(),
            }  # fmt: skip
        with PromptProgress(engine, quiet=verbosity() < 0) as progress:
            last = print_stream(engine.stream(prompt, on_prefill=progress.show, **options))
        click.echo()
        assert last.stats is not None
        say_figures(engine, last.stats)
        return {}
