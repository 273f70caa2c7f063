"""The commands that generate text: `generate`, `chat` and `demo`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from offmoe.cli.options import (
    Command,
    choice_options,
    engine_options,
    grammar_options,
    json_option,
    print_json,
    read_grammar_files,
    read_stdin,
    sampling_options,
    split_engine_options,
    template_arguments,
    user_errors,
    verbosity_options,
)

DEMO_PROMPT = "def read_lines(path):\n    "


@click.command()
@click.argument("model", required=False)
@click.option("-p", "--prompt", required=True, help='The text to continue; "-" reads it from standard input.')
@sampling_options
@grammar_options
@engine_options
@verbosity_options
@json_option
@user_errors
def generate(model: str | None, prompt: str, stop: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Continue a prompt."""
    from offmoe.cli.generate import run_generate

    read_grammar_files(options)
    engine_given, sampling = split_engine_options(options)
    text = read_stdin() if prompt == "-" else prompt
    record = run_generate(model, engine_given, {"stop": stop, **sampling}, text, quiet=as_json)
    if as_json:
        print_json(record)


def _chat_options(command: Command) -> Command:
    """The flags of `chat` and `run`."""
    options: list[Callable[[Command], Command]] = [
        click.option("--system", help="A system message."),
        click.option(
            "-n",
            "--max-new-tokens",
            type=click.IntRange(1),
            metavar="N",
            help="Length of a reply. Default: as many as the context has room for.",
        ),
        click.option(
            "--thinking",
            type=click.Choice(["on", "off"]),
            help="Whether the model reasons before it answers, where it can.",
        ),
        click.option(
            "--template-arg",
            "template_args",
            multiple=True,
            metavar="NAME=VALUE",
            help="An argument of the model's chat template; VALUE is JSON or text. May be given more than once.",
        ),
        click.option(
            "--allow-control-tokens",
            is_flag=True,
            help="Control tokens in a message are structure. Otherwise they are text.",
        ),
        click.option("--no-color", is_flag=True, help="No colors, as with NO_COLOR set in the environment."),
        click.option("--plain", is_flag=True, help="Replies as the model writes them, no formatted Markdown."),
        click.option("--no-history", is_flag=True, help="Do not remember the lines typed."),
        choice_options,
        grammar_options,
        engine_options,
        verbosity_options,
        click.option("--json", "as_json", is_flag=True, help="Print each reply as a line of JSON."),
    ]
    return functools.reduce(lambda f, option: option(f), reversed(options), command)


@click.command()
@click.argument("model", required=False)
@click.argument("dash", metavar="[-]", required=False)
@_chat_options
@user_errors
def chat(
    model: str | None, dash: str | None, stop: tuple[str, ...], template_args: tuple[str, ...], thinking: str | None,
    allow_control_tokens: bool, **options: Any,
) -> None:  # fmt: skip
    """Talk with a model. Ctrl-C stops a reply; /help lists commands; /exit or end of input leaves.

    In a pipe each line is a message, and with "-" all of standard input is one. A line that cannot be answered gets an
    error in place of a reply; the exit code is then 2.
    """
    from offmoe.cli.chat.start import TemplateOptions, start_chat

    read_grammar_files(options)
    template = TemplateOptions(template_arguments(template_args), thinking, allow_control_tokens)
    start_chat(model, dash, {"stop": stop, **options}, template)


@click.command()
@click.argument("model")
@click.argument("words", metavar="[QUESTION]", nargs=-1)
@_chat_options
@user_errors
def run(
    model: str, words: tuple[str, ...], stop: tuple[str, ...], template_args: tuple[str, ...], thinking: str | None,
    allow_control_tokens: bool, **options: Any,
) -> None:  # fmt: skip
    """Answer one QUESTION and end; without a question, talk as in chat. MODEL may be "demo".

    A "-" in the question stands for all of standard input.
    """
    from offmoe.cli.chat.start import TemplateOptions, start_run

    read_grammar_files(options)
    template = TemplateOptions(template_arguments(template_args), thinking, allow_control_tokens)
    start_run(model, words, {"stop": stop, **options}, template)


@click.command()
@click.option("-p", "--prompt", default=DEMO_PROMPT, show_default=False, help="The text to continue.")
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
