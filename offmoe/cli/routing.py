"""The commands about routing: `trace` records it, `replay` and `tune` say what it means for the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from offmoe.cli.options import (
    Command,
    choice_options,
    engine_options,
    json_option,
    named_config,
    print_json,
    say_renamed,
    split_engine_options,
    user_errors,
)

_FILE = click.Path(path_type=Path)


def force_option(command: Command) -> Command:
    """--force."""
    return click.option("--force", is_flag=True, help="Also over a file that offmoe did not write.")(command)


def _shown_options(command: Command) -> Command:
    options: list[Callable[[Command], Command]] = [
        click.option("--plot", type=_FILE, metavar="FILE", help="Draw the curves into a .png or .svg, too."),
        click.option("--no-color", is_flag=True, help="No colours in the terminal's chart."),
        force_option,
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("model", required=False)
@click.option("--prompts", "prompts_file", type=_FILE, required=True, help="A file with one prompt a line.")
@click.option("--whole", is_flag=True, help="The file's text is one prompt.")
@click.option("-o", "--output", type=_FILE, required=True, metavar="FILE", help="The trace to write.")
@click.option("--guesses/--no-guesses", default=True, help="Ask the routers of coming layers, too; slower.")
@force_option
@click.option(
    "--max-new-tokens", type=click.IntRange(1), metavar="N", default=256, show_default=True,
    help="Tokens after each prompt.",
)  # fmt: skip
@choice_options
@engine_options
@json_option
@user_errors
def trace(
    model: str | None, prompts_file: Path, whole: bool, output: Path, guesses: bool, force: bool,
    stop: tuple[str, ...], as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Record which experts a model uses, for tune and replay. Generates from each prompt, past its end token.

    Ctrl-C keeps what was recorded.
    """
    from offmoe.cli.trace import run_trace

    engine_given, sampling = split_engine_options(options)
    if stop:
        sampling["stop"] = list(stop)
    record = run_trace(
        model, engine_given, sampling, prompts_file, output, whole=whole, guesses=guesses, force=force, quiet=as_json
    )
    if as_json:
        print_json(record)


@click.command()
@click.argument("trace_file", metavar="TRACE", type=_FILE)
@click.option("--expert-slots", "fit", type=click.IntRange(1), metavar="N", help="Expert slots to mark.")
@click.option("--experts", "old_name", type=click.IntRange(1), hidden=True)
@_shown_options
@user_errors
def replay(
    trace_file: Path, fit: int | None, old_name: int | None, plot: Path | None, no_color: bool, force: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Hit rates that a trace would have had at every cache size; no model is needed."""
    from offmoe.cli.tune import Shown, run_replay

    if old_name is not None:
        say_renamed(str(old_name))
        fit = fit or old_name
    record = run_replay(trace_file, Shown(as_json=as_json, plot=plot, no_color=no_color, force=force), fit=fit)
    if as_json:
        print_json(record)


@click.command()
@click.argument("model", required=False)
@click.option("--trace", "trace_file", type=_FILE, metavar="FILE", help="A trace of this model, instead of a new one.")
@click.option("--prompts", "prompts_file", type=_FILE, metavar="FILE", help="Prompts for a new trace, one a line.")
@click.option(
    "--max-new-tokens", type=click.IntRange(2), metavar="N", default=256, show_default=True,
    help="Tokens of each prompt's reply in a new trace.",
)  # fmt: skip
@click.option(
    "--choose", type=click.Choice(["fit", "knee"]), default="fit", show_default=True,
    help="The largest cache that fits, or the knee: where more memory begins to bring less.",
)  # fmt: skip
@click.option("--show", is_flag=True, help="Say which flags are saved, for MODEL or for all; measure nothing.")
@click.option("--forget", is_flag=True, help="Take back the flags that are saved for the model; measure nothing.")
@engine_options
@_shown_options
@user_errors
def tune(
    model: str | None, trace_file: Path | None, prompts_file: Path | None, max_new_tokens: int, choose: str,
    show: bool, forget: bool, plot: Path | None, no_color: bool, force: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Find the cache size and policy for a model on this machine, and save them for the other commands.

    They are written to --config, by default to the user's folder of settings; --config off writes nothing.
    """
    if show or forget:
        from offmoe.cli.saved import show_saved

        record = show_saved(model, forget=forget, config=named_config(), quiet=as_json)
        if as_json:
            print_json(record)
        return
    from offmoe.cli.tune import Shown, run_tune

    engine_given, _ = split_engine_options(options)
    record = run_tune(
        model, engine_given, Shown(as_json=as_json, plot=plot, no_color=no_color, force=force), trace_file=trace_file,
        prompts_file=prompts_file, max_new_tokens=max_new_tokens, config=named_config(), choose=choose,
    )  # fmt: skip
    if as_json:
        print_json(record)
