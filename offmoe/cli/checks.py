"""The commands that run a model to compare or to time it: `verify` and `bench`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from offmoe.cli.options import engine_options, json_option, print_json, split_engine_options, user_errors
from offmoe.core.errors import UsageError
from offmoe.core.files import read_text_bounded


@click.command()
@click.argument("model", required=False)
@click.option("--prompt", default="The quick brown fox", show_default=True, help="The text to compare on.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=8, show_default=True, help="Greedy tokens to compare."
)
@engine_options
@json_option
@user_errors
def verify(model: str | None, prompt: str, max_new_tokens: int, as_json: bool, **options: Any) -> None:
    """Check that cached output equals uncached output, at three cache sizes."""
    from offmoe.cli.verify import run_verify

    engine_given, _ = split_engine_options(options)
    sys.exit(run_verify(model, engine_given, prompt, max_new_tokens, as_json=as_json))


@click.command()
@click.argument("model", required=False)
@click.option(
    "--ids", "ids_file", type=click.Path(path_type=Path), help="JSON list of token ids to go through as given."
)
@click.option("--prompt", help="Text to go through instead of --ids.")
@click.option("--prefill", type=click.IntRange(1), default=128, show_default=True, help="Ids read at once, first.")
@click.option("--decode", type=click.IntRange(2), help="Ids decoded one at a time; default: all that are left.")
@click.option("--warm", is_flag=True, help="Go through the ids once before they are timed: experts are then in RAM.")
@engine_options
@json_option
@user_errors
def bench(
    model: str | None, ids_file: Path | None, prompt: str | None, prefill: int, decode: int | None, warm: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Time load, prompt and decoding on given ids.

    A table on a terminal; with --json, and in a pipe, the last line of standard output is one JSON object.
    """
    from offmoe.cli.bench import run_bench_command

    engine_given, _ = split_engine_options(options)
    ids = None if ids_file is None else read_ids(ids_file)
    record = run_bench_command(model, engine_given, ids, prompt, prefill, decode, warm=warm, quiet=as_json)
    if not as_json:
        from offmoe.report.bench_table import bench_rows
        from offmoe.report.tables import print_pairs

        with contextlib.redirect_stdout(sys.stdout if sys.stdout.isatty() else sys.stderr):
            print_pairs(f"{record['prompt_tokens']} tokens read, {record['new_tokens']} decoded", bench_rows(record))
    if as_json or not sys.stdout.isatty():
        print_json(record)


def read_ids(path: Path) -> list[int]:
    """A JSON list of token ids. Raises UsageError naming the file."""
    try:
        ids = json.loads(read_text_bounded(path, "--ids"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--ids {path} cannot be read as JSON: {error}") from None
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise UsageError(f"--ids {path} is no list of token ids; expected JSON like [1, 2, 3]")
    return ids
