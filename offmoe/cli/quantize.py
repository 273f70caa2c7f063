"""`offmoe quantize`: writes the smaller checkpoint, says what it saves and, with a text, what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from offmoe.checkpoint.writer import refuse_target
from offmoe.cli.session import hush_libraries, open_engine
from offmoe.core.config import make_config
from offmoe.core.errors import UsageError
from offmoe.core.files import read_text_bounded
from offmoe.core.units import format_bytes, format_percent
from offmoe.loader.fetch import fetch_model
from offmoe.machine.memory import rss_bytes
from offmoe.report.progress import ProgressReporter


def run_quantize(
    source: str, target: Path, options: dict[str, Any], text_file: Path | None, *, quiet: bool
) -> dict[str, Any]:
    """Quantise and, with `text_file`, measure both; returns the record. `options` are those of QuantiseOptions."""
    with ProgressReporter(quiet=quiet) as progress:
        folder = fetch_model(source, make_config(), progress)
    refuse_target(folder, target)
    text = None if text_file is None else read_eval_text(text_file)
    if text is not None and not any(folder.glob("tokenizer*")):
        raise UsageError(f"{folder} has no tokenizer, which --eval needs")
    from offmoe.quantize.write import QuantiseOptions, quantise

    hush_libraries()
    with ProgressReporter(quiet=quiet) as progress:
        result = quantise(folder, target, QuantiseOptions(**options), progress)
    record = {"target": str(target), **result.as_dict()}
    if not quiet:
        what = f"{result.repacked} matrices repacked, with the same values" if result.repacked else (
            f"{result.num_experts} experts in {options['expert_format']}, groups of {options['group']}; "
            f"{result.num_dense} other linear layers quantised"
        )  # fmt: skip
        click.echo(
            f"{target}: {format_bytes(result.source_bytes)} -> {format_bytes(result.written_bytes)} "
            f"({format_percent(result.written_bytes / result.source_bytes)}): {what}"
        )
        if result.resumed:
            click.echo(f"{result.resumed} of {result.num_shards} files were there from a run before")
    if text is not None and result.repacked:
        click.echo("the values are the same, and so is the perplexity: --eval has nothing to compare", err=True)
    elif text is not None:
        record |= _compare(folder, target, text, quiet=quiet)
    return record


def _compare(source: Path, target: Path, text: str, *, quiet: bool) -> dict[str, Any]:
    before, after = (_perplexity(folder, text, quiet=quiet) for folder in (source, target))
    if not quiet:
        click.echo(
            f"perplexity on {before.num_tokens} tokens: {before.value:.4f} -> {after.value:.4f} "
            f"({100 * (after.value / before.value - 1):+.2f}%)"
        )
    return {"eval_tokens": before.num_tokens, "perplexity_before": before.value, "perplexity_after": after.value}


def _perplexity(folder: Path, text: str, *, quiet: bool) -> Any:
    from offmoe.engine.prompt import encode_prompt
    from offmoe.report.perplexity import perplexity

    with (
        open_engine(str(folder), {}, quiet=True, baseline_bytes=rss_bytes()) as engine,
        ProgressReporter(quiet=quiet) as progress,
    ):
        ids = encode_prompt(text, engine.tokenizer, vocab_size=engine.vocab_size)
        return perplexity(engine, ids, lambda done, total: progress(f"reading {folder.name}", done, total))


def read_eval_text(path: Path) -> str:
    """Text that --eval names. Raises UsageError."""
    return read_text_bounded(path, "--eval")
