"""Flags that several commands share, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import codecs
import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from offmoe.core.config import OPTION_NAMES
from offmoe.core.errors import OffmoeError, UsageError
from offmoe.machine.memory import rss_bytes

Command = TypeVar("Command", bound=Callable[..., Any])
_CONFIG_KEY, _VERBOSITY_KEY = "offmoe.config", "offmoe.verbosity"
_MOST_FILE_BYTES = 256 << 10
EXPERT_FORMATS = ("int4", "int8")
REVISION_HELP = "Branch, tag or commit of a model on the hub. Default: its main branch."


def _keep_config(context: click.Context, _: click.Parameter, value: str | None) -> None:
    context.meta[_CONFIG_KEY] = value


# One for each of OPTION_NAMES.
_ENGINE_FLAGS = [
    click.option(
        "--ram", metavar="SIZE", help='Memory the process may use, e.g. "6GiB". Default: most of what is free.'
    ),
    click.option(
        "--vram", metavar="SIZE", help='Device memory to use, e.g. "6GiB". Default: most of what is free there.'
    ),
    click.option(
        "--context-length", "--context", "context_length", metavar="N",
        help="Tokens of prompt plus reply to set memory aside for.",
    ),
    click.option("--expert-slots", metavar="N", help="Expert slots, instead of what --vram or --ram leaves room for."),
    click.option("--prefill-chunk", metavar="N", help="Prompt tokens that go through the model at once."),
    click.option(
        "--kept-prompts", metavar="SIZE", help="Memory of --ram for prompts that were read; 0: none. Default: auto."
    ),
    click.option("--prompt-cache", metavar="DIR", help="A folder where prompts are kept from run to run."),
    click.option("--prompt-cache-size", metavar="SIZE", help="What the folder may have. Default: 16GiB."),
    click.option("--policy", metavar="auto|lru|lfru|decayed", help="Which experts are evicted."),
    click.option(
        "--warm-start/--no-warm-start", default=None, help="Count experts' uses from run to run, in the cache folder."
    ),
    click.option("--io", metavar="auto|direct|buffered", help="How experts are read from disk."),
    click.option("--device", metavar="auto|cpu|cuda|cuda:N", help="Where to compute."),
    click.option(
        "--miss", metavar="auto|stream|cpu", help="Copy experts that the device lacks there, or compute them in RAM."
    ),
    click.option("--prefetch", metavar="auto|off|N", help="How many layers ahead experts are fetched, 1 to 3."),
    click.option("--compile", metavar="auto|off|on", help="Compile the part of the model that stays in memory."),
    click.option("--pack", metavar="auto|off|on", help="Keep bfloat16 weights in 12 bits in RAM, without loss."),
    click.option(
        "--placement-invariant", is_flag=True, default=None,
        help="Compute every expert in one place: the same rounding whatever is cached where.",
    ),
    click.option("--trust-remote-code", is_flag=True, default=None, help="Run Python code that comes with the model."),
    click.option("--revision", metavar="NAME", help=REVISION_HELP),
]  # fmt: skip
_OLD_FLAG = click.option("--experts", hidden=True)
_CONFIG_FLAG = click.option(
    "--config", metavar="FILE|off", expose_value=False, callback=_keep_config,
    help="Flags that offmoe tune has chosen; by default in the user's folder of settings.",
)  # fmt: skip
_CHOICE_FLAGS = [
    click.option(
        "--temperature", type=click.FloatRange(0), metavar="X",
        help="0 is greedy. Default: what the model's publisher set.",
    ),
    click.option("--top-k", type=click.IntRange(0), metavar="N", help="Sample from the N likeliest tokens."),
    click.option(
        "--top-p", type=click.FloatRange(0, 1, min_open=True), metavar="X",
        help="Sample from the likeliest tokens that sum to X.",
    ),
    click.option(
        "--min-p", type=click.FloatRange(0, 1), metavar="X",
        help="Drop tokens below X times the likeliest one's probability.",
    ),
    click.option(
        "--repetition-penalty", type=click.FloatRange(0, min_open=True), metavar="X",
        help="Above 1: avoid tokens that occurred before.",
    ),
    click.option(
        "--presence-penalty", type=click.FloatRange(-2, 2), metavar="X",
        help="Above 0: avoid tokens that occurred in the reply.",
    ),
    click.option(
        "--frequency-penalty", type=click.FloatRange(-2, 2), metavar="X",
        help="Above 0: avoid tokens that occurred in the reply, the more the oftener they did.",
    ),
    click.option("--seed", type=click.IntRange(0), metavar="N", help="Make sampling repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the reply at TEXT. May be given more than once."),
]  # fmt: skip


def engine_options(command: Command) -> Command:
    """The cache flags, and where flags that were saved for a model are read from."""
    return functools.reduce(lambda f, option: option(f), reversed([*_ENGINE_FLAGS, _OLD_FLAG, _CONFIG_FLAG]), command)


def _keep_verbosity(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.meta[_VERBOSITY_KEY] = 1 if parameter.name == "verbose" else -1


def verbosity_options(command: Command) -> Command:
    """-v and -q; `verbosity` tells."""
    flags = [
        click.option(
            "-v", "--verbose", is_flag=True, expose_value=False, callback=_keep_verbosity,
            help="More figures after a reply: hits, bytes, waits, memory.",
        ),
        click.option(
            "-q", "--quiet", is_flag=True, expose_value=False, callback=_keep_verbosity,
            help="The reply alone: no progress, no figures.",
        ),
    ]  # fmt: skip
    return functools.reduce(lambda f, option: option(f), reversed(flags), command)


def verbosity() -> int:
    """Return 1 with --verbose, -1 with --quiet, else 0."""
    context = click.get_current_context(silent=True)
    return int(context.meta.get(_VERBOSITY_KEY, 0)) if context is not None else 0


def named_config() -> str | None:
    """The value of --config: a file, "off", or None for the user's own file."""
    context = click.get_current_context(silent=True)
    return context.meta.get(_CONFIG_KEY) if context is not None else None


def sampling_options(command: Command) -> Command:
    """The flags of how long a reply is and how its tokens are chosen."""
    length = click.option(
        "-n", "--max-new-tokens", type=click.IntRange(1), metavar="N",
        help="Length of the reply. Default: what the model's publisher set, else 256.",
    )  # fmt: skip
    return length(choice_options(command))


def choice_options(command: Command) -> Command:
    """The flags of how tokens are chosen."""
    return functools.reduce(lambda f, option: option(f), reversed(_CHOICE_FLAGS), command)


def grammar_options(command: Command) -> Command:
    """The flags that say what form a reply has: at most one of them is given."""
    options = [
        click.option(
            "--json-schema", metavar="FILE",
            help="The reply is JSON that the schema in FILE takes.",
        ),
        click.option("--regex", metavar="TEXT", help="The reply is a text that this regular expression matches."),
        click.option(
            "--grammar", metavar="FILE", help="The reply is a text of the Lark grammar in FILE.",
        ),
    ]  # fmt: skip
    return functools.reduce(lambda f, option: option(f), reversed(options), command)


def read_grammar_files(options: dict[str, Any]) -> None:
    """Put the text of the files that --json-schema and --grammar name in the place of their names. Errors name them."""
    for name in ("json_schema", "grammar"):
        if options.get(name) is not None:
            options[name] = _read_file("--" + name.replace("_", "-"), options[name])


def _read_file(flag: str, path: str) -> str:
    """The text of a small file."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MOST_FILE_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{flag} {path} is no text") from None
    if not text.strip():
        raise UsageError(f"{flag} {path} is empty")
    if len(data) > _MOST_FILE_BYTES:
        raise UsageError(f"{flag} {path} has more than {_MOST_FILE_BYTES >> 10} KiB, which is the most")
    return text


def json_option(command: Command) -> Command:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")(command)


def split_engine_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(engine options, the others), leaving out what was not given."""
    given = {name: value for name, value in options.items() if value is not None}
    if (old := given.pop("experts", None)) is not None:
        given.setdefault(say_renamed(old), old)
    engine = {name: value for name, value in given.items() if name in OPTION_NAMES}
    return engine, {name: value for name, value in given.items() if name not in OPTION_NAMES}


def say_renamed(value: str) -> str:
    """Return the option that --experts with this value became in 0.1.0, and print that it was renamed."""
    name = "expert_format" if value in EXPERT_FORMATS else "expert_slots"
    click.echo(f"--experts is called --{name.replace('_', '-')} now; the next release drops the old name", err=True)
    return name


def user_errors(command: Command) -> Command:
    """OffmoeError becomes one line on stderr and exit code 2; Ctrl-C exit code 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except OffmoeError as error:
            click.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            sys.exit(130)

    return wrapped  # type: ignore[return-value]


class _WarningLines(logging.Handler):
    """A line on standard error for each warning of the library."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"warning: {' '.join(record.getMessage().split())}", err=True)


def begin_process(context: click.Context) -> None:
    """Prepare the process, before torch is imported: budgets and peaks count from the memory used at this moment."""
    context.obj = rss_bytes()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a model's text may hold what a narrow encoding has not
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    logger = logging.getLogger("offmoe")
    if not any(isinstance(handler, _WarningLines) for handler in logger.handlers):
        logger.addHandler(_WarningLines(logging.WARNING))


def process_baseline_bytes() -> int:
    """Resident memory when the process began."""
    baseline = click.get_current_context().find_root().obj
    assert isinstance(baseline, int), f"{baseline=}"
    return baseline


def read_stdin() -> str:
    """All of standard input, which must be text. Raises UsageError."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input has the byte {error.object[error.start]:#04x} at {error.start}, which is no "
            f"{error.encoding} text; convert it first"
        ) from None


def print_json(record: dict[str, Any]) -> None:
    """One line of JSON to stdout; where that cannot carry all characters, with escapes for them."""
    encoding = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name
    click.echo(json.dumps(record, ensure_ascii=not encoding.startswith("utf")))


def template_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Names and values given to --template-arg; values are JSON where they parse as that. Raises UsageError."""
    arguments: dict[str, Any] = {}
    for argument in given:
        name, equals, text = argument.partition("=")
        if not name or not equals:
            raise UsageError(f"--template-arg is {argument!r}; use NAME=VALUE, such as enable_thinking=false")
        try:
            arguments[name] = json.loads(text)
        except (ValueError, RecursionError):
            arguments[name] = text
    return arguments
