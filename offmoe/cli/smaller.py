"""The command that writes a smaller model: `quantize`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from offmoe.cli.options import EXPERT_FORMATS as KINDS
from offmoe.cli.options import Command, json_option, print_json, say_renamed, user_errors


def _kind_or_keep(name: str, what: str) -> Callable[[Command], Command]:
    return click.option(name, type=click.Choice(["keep", *KINDS]), default="keep", show_default=True, help=what)


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--expert-format", type=click.Choice(KINDS), help="What the routed experts become. Required.")
@click.option("--experts", "old_name", type=click.Choice(KINDS), hidden=True)
@_kind_or_keep("--dense", "What other linear layers become. Routers, norms and embeddings always stay.")
@_kind_or_keep("--head", "What the output head becomes: it is read for every token.")
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
    source: str, target: Path, expert_format: str | None, old_name: str | None, dense: str, head: str, group: str,
    text_file: Path | None, trust_remote_code: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write SOURCE to the new folder TARGET with integers for its experts, as compressed-tensors does.

    A run that was cut off goes on when it is repeated.
    """
    from offmoe.cli.quantize import run_quantize

    if expert_format is None and old_name is not None:
        say_renamed(old_name)
        expert_format = old_name
    if expert_format is None:
        raise click.UsageError(f"Missing option '--expert-format'. Choose from: {', '.join(KINDS)}")
    options = {
        "expert_format": expert_format, "dense": None if dense == "keep" else dense,
        "head": None if head == "keep" else head, "group": int(group),
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    record = run_quantize(source, target, options, text_file, quiet=as_json)
    if as_json:
        print_json(record)
