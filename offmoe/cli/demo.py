"""`offmoe demo`: the bundled model with a quarter of its experts cached."""

from __future__ import annotations

from typing import Any

import click

from offmoe.checkpoint.locate import demo_model_folder
from offmoe.cli.session import open_engine, peak_line, print_stream
from offmoe.core.units import format_bytes, format_percent, format_traffic
from offmoe.planner.inspect import inspect_checkpoint

CACHED_SHARE = 0.25


def run_demo(prompt: str, *, max_new_tokens: int, seed: int, quiet: bool) -> dict[str, Any]:
    """Stream a continuation of `prompt` and say what it cost; returns the same as a record."""
    found = inspect_checkpoint(demo_model_folder())
    total = found.num_moe_layers * found.experts_per_layer
    slots = max(found.top_k, round(total * CACHED_SHARE))
    with open_engine(None, {"expert_slots": slots}, quiet=quiet) as engine:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 0.7, "top_p": 0.95, "seed": seed}
        if quiet:
            reply = engine.generate(prompt, **options)
            return {"text": prompt + reply.text, **reply.stats.as_dict(), "engine": engine.stats().as_dict()}
        click.echo(prompt, nl=False)
        last = print_stream(engine.stream(prompt, **options))
        stats = last.stats
        assert stats is not None
        click.echo("\n")
        totals = engine.stats()
        click.echo(stats.line(), err=True)
        click.echo(
            f"{slots} of {total} experts of {format_bytes(found.expert_bytes)} were in memory "
            f"({format_percent(slots / total)}); {totals.hits} of {totals.hits + totals.misses} look-ups hit; "
            f"{format_traffic(totals.disk_bytes)} read from disk",
            err=True,
        )
        click.echo(peak_line(engine), err=True)
        return {}
