"""The `offmoe` command. torch and transformers are imported by the commands that need them, not here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from offmoe import __version__
from offmoe.base.errors import UsageError
from offmoe.checkpoint.locate import locate_model
from offmoe.cli.group import OneLineGroup
from offmoe.cli.options import (
    begin_process,
    choice_options,
    engine_options,
    json_option,
    print_json,
    read_stdin,
    sampling_options,
    split_engine_options,
    user_errors,
)
from offmoe.cli.routing import replay, trace, tune

DEMO_PROMPT = "def read_lines(path):\n    "


@click.group(
    cls=OneLineGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="offmoe")
@click.pass_context
def main(context: click.Context) -> None:
    """Run Mixture-of-Experts language models larger than memory, exactly as published.

    MODEL is a Hugging Face model folder or a hub id; without one, the bundled demo model is used.
    """
    begin_process(context)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@click.argument("model", required=False)
@click.option("--prompt", required=True, help='The text to continue; "-" reads it from standard input.')
@sampling_options
@engine_options
@json_option
@user_errors
def generate(model: str | None, prompt: str, stop: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Continue a prompt."""
    from offmoe.cli.session import open_engine, peak_line, print_stream
    from offmoe.report.progress import ProgressReporter

    engine_given, sampling = split_engine_options(options)
    text = read_stdin() if prompt == "-" else prompt
    with open_engine(model, engine_given, quiet=as_json) as engine:
        if as_json:
            reply = engine.generate(text, stop=stop, **sampling)
            print_json(
                {
                    "text": reply.text, "token_ids": reply.token_ids, "finish_reason": reply.finish_reason,
                    "stats": reply.stats.as_dict(), "engine": engine.stats(),
                }
            )  # fmt: skip
            return
        with ProgressReporter() as progress:
            pieces = engine.stream(
                text, stop=stop, on_prefill=lambda done, total: progress("prompt", done, total), **sampling
            )
            last = print_stream(pieces)
        click.echo()
        assert last.stats is not None
        click.echo(last.stats.line(), err=True)
        click.echo(peak_line(engine), err=True)


@main.command()
@click.argument("model", required=False)
@click.argument("dash", metavar="[-]", required=False)
@click.option("--system", help="A system message.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Length of a reply. Default: as many as the context has room for.",
)
@click.option("--no-color", is_flag=True, help="No colors, as with NO_COLOR set in the environment.")
@click.option("--plain", is_flag=True, help="Replies as the model writes them, no formatted Markdown.")
@click.option("--no-history", is_flag=True, help="Do not remember the lines typed.")
@choice_options
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print each reply as a line of JSON.")
@user_errors
def chat(model: str | None, dash: str | None, stop: tuple[str, ...], **options: Any) -> None:
    """Talk with a model. Ctrl-C stops a reply; /help lists commands; /exit or end of input leaves.

    In a pipe each line is a message, and with "-" all of standard input is one.
    """
    from offmoe.cli.chat_start import start_chat

    start_chat(model, dash, {"stop": stop, **options})


@main.command()
@click.option("--prompt", default=DEMO_PROMPT, show_default=False, help="The text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=160, show_default=True, help="Length of the reply.")
@click.option("--seed", type=int, default=1, show_default=True, help="Another seed, another text.")
@json_option
@user_errors
def demo(prompt: str, max_new_tokens: int, seed: int, as_json: bool) -> None:
    """Stream the bundled model with a quarter of its experts in memory, and show what that cost."""
    from offmoe.cli.demo import run_demo

    record = run_demo(prompt, max_new_tokens=max_new_tokens, seed=seed, quiet=as_json)
    if as_json:
        print_json(record)


@main.command()
@click.argument("model", required=False)
@json_option
@user_errors
def inspect(model: str | None, as_json: bool) -> None:
    """Layers, experts and sizes of a checkpoint, from its headers alone."""
    from offmoe.planner.survey import survey
    from offmoe.report.tables import print_pairs, survey_rows

    folder = locate_model(model)
    found = survey(folder)
    if as_json:
        print_json(found.as_dict())
    else:
        print_pairs(str(folder.name), survey_rows(found))


@main.command()
@click.option("--model", help="Measure the drive of this model's folder. Default: that of the bundled model.")
@click.option("--path", type=click.Path(path_type=Path), help="Measure the drive of this file or folder. Only read.")
@click.option("--refresh", is_flag=True, help="Measure again what was measured before.")
@json_option
@user_errors
def probe(model: str | None, path: Path | None, refresh: bool, as_json: bool) -> None:
    """Measure this machine once, in some seconds: memory, experts on the CPU, link and drive. `plan` uses it."""
    from offmoe.cli.probe import probe_machine
    from offmoe.report.probe_table import probe_rows
    from offmoe.report.tables import print_pairs

    record = probe_machine(model, path, refresh=refresh, quiet=as_json)
    if as_json:
        print_json(record.as_dict())
    else:
        print_pairs(record.name, probe_rows(record))


@main.command()
@click.argument("model", required=False)
@click.option("--for", "machine", metavar="MACHINE", help='Another machine than this one, e.g. "RTX 4060 laptop".')
@click.option("--trace", type=click.Path(path_type=Path), help="Hit rates from this trace of the model.")
@click.option("--prompt-tokens", type=click.IntRange(1), metavar="N", help="The prompt whose time is predicted.")
@engine_options
@json_option
@user_errors
def plan(
    model: str | None, machine: str | None, trace: Path | None, prompt_tokens: int | None, as_json: bool, **options: Any
) -> None:
    """What goes where and how fast it will be, from config and headers, before anything is loaded.

    A hub id needs no download of weights. --experts int4 or int8 plans for experts as `offmoe quantize` writes them.
    """
    from offmoe.planner.foresee import run_plan
    from offmoe.report.plan_table import plan_tables
    from offmoe.report.progress import ProgressReporter
    from offmoe.report.tables import print_pairs

    engine_given, _ = split_engine_options(options)
    with ProgressReporter(quiet=as_json) as progress:
        found = run_plan(
            model, engine_given, machine=machine, trace=trace, prompt_tokens=prompt_tokens, progress=progress
        )
    if as_json:
        print_json(found.as_dict())
    else:
        for title, rows in plan_tables(found):
            print_pairs(title, rows)
            click.echo()
        click.echo(found.line())


@main.command()
@click.argument("model", required=False)
@click.option("--prompt", default="The quick brown fox", show_default=True, help="The text to compare on.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=8, show_default=True, help="Greedy tokens to compare."
)
@click.option(
    "--eval",
    "text_file",
    type=click.Path(path_type=Path),
    help="With --fast-activations: a text to price it on. Default: the model's own.",
)
@engine_options
@json_option
@user_errors
def verify(
    model: str | None, prompt: str, max_new_tokens: int, text_file: Path | None, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Check that cached output equals uncached output, at three cache sizes.

    With --fast-activations also what that costs: perplexity and KL divergence against exact activations.
    """
    from offmoe.cli.verify import run_verify

    engine_given, _ = split_engine_options(options)
    sys.exit(run_verify(model, engine_given, prompt, max_new_tokens, text_file, as_json=as_json))


@main.command()
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
    """Time load, prompt and decoding on given ids. The last line of standard output is one JSON object."""
    from offmoe.cli.bench import run_bench_command

    engine_given, _ = split_engine_options(options)
    ids = None if ids_file is None else read_ids(ids_file)
    record = run_bench_command(model, engine_given, ids, prompt, prefill, decode, warm=warm, quiet=as_json)
    print_json(record)


@main.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--experts", type=click.Choice(["int4", "int8"]), required=True, help="What the routed experts become.")
@click.option(
    "--dense",
    type=click.Choice(["keep", "int4", "int8"]),
    default="keep",
    show_default=True,
    help="What other linear layers become. Routers, norms and embeddings always stay.",
)
@click.option(
    "--head",
    type=click.Choice(["keep", "int4", "int8"]),
    default="keep",
    show_default=True,
    help="What the output head becomes: it is read for every token.",
)
@click.option(
    "--group",
    type=click.Choice(["32", "64", "128"]),
    default="32",
    show_default=True,
    help="Columns that share a scale: fewer are more exact and larger.",
)
@click.option(
    "--eval", "text_file", type=click.Path(path_type=Path), help="A text to compare both models' perplexity on."
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@json_option
@user_errors
def quantize(
    source: str, target: Path, experts: str, dense: str, head: str, group: str, text_file: Path | None,
    trust_remote_code: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write SOURCE to the new folder TARGET with integers for its experts, as compressed-tensors does.

    A run that was cut off goes on when it is repeated.
    """
    from offmoe.cli.quantize import run_quantize

    options = {
        "experts": experts, "dense": None if dense == "keep" else dense,
        "head": None if head == "keep" else head, "group": int(group),
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    record = run_quantize(source, target, options, text_file, quiet=as_json)
    if as_json:
        print_json(record)


for _command in (trace, replay, tune):
    main.add_command(_command)


def read_ids(path: Path) -> list[int]:
    """A JSON list of token ids. Raises UsageError naming the file."""
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--ids {path} cannot be read as JSON: {error}") from None
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise UsageError(f"--ids {path} is no list of token ids; expected JSON like [1, 2, 3]")
    return ids


if __name__ == "__main__":
    main()
