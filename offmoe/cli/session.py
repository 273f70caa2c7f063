"""Loading and streaming as the commands do it: the plan first, progress while waiting, statistics last."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offmoe.checkpoint.identity import model_hash
from offmoe.cli.options import named_config, process_baseline_bytes, verbosity
from offmoe.cli.say import say
from offmoe.core.config import EngineConfig, make_config
from offmoe.core.errors import UsageError
from offmoe.core.progress import Progress
from offmoe.core.saved_flags import SavedFlags, default_path, read_flags
from offmoe.core.units import format_bytes, format_traffic
from offmoe.loader.fetch import fetch_model
from offmoe.report.progress import ProgressReporter

if TYPE_CHECKING:
    from offmoe.engine.engine import Engine
    from offmoe.engine.engine_stats import EngineStats
    from offmoe.engine.stats import GenerationStats
    from offmoe.engine.stream import Chunk, Stream


def check_request(model: str | None, options: dict[str, Any], *, quiet: bool = False) -> Path:
    """The model's folder; a name on the hub is fetched, with progress on stderr. Imports nothing heavy for a model that
    is here: a wrong name or option is told before seconds of imports.
    """
    config = make_config(**options)
    with ProgressReporter(quiet=quiet) as progress:
        return fetch_model(model, config, progress)


def open_engine(
    model: str | None, options: dict[str, Any], *, quiet: bool = False, baseline_bytes: int | None = None,
    use_saved: bool = True, prompt: str | None = None, tell_progress: Progress = lambda stage, done, total: None,
) -> Engine:  # fmt: skip
    """Load with plan and progress on stderr, then say what goes where (unless `quiet`); at the end what came of it.

    The budget counts from `baseline_bytes`, by default from the begin of the process. `use_saved`: with the flags that
    `offmoe tune` chose for this model, where `options` leave them open; which ones is said. A `prompt` without room in
    the context is refused before weights are read. `tell_progress` is told of the load, too.
    """
    quiet = quiet or verbosity() < 0
    baseline = process_baseline_bytes() if baseline_bytes is None else baseline_bytes
    folder = check_request(model, options, quiet=quiet)
    if use_saved and (saved := saved_flags(folder, options)) is not None:
        options = {**options, **saved.flags}
        if not quiet:
            click.echo(f"flags: {saved.line()}", err=True)

    def tell(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    with ProgressReporter(quiet=quiet, at_once=True) as shown:

        def progress(stage: str, done: int, total: int) -> None:
            shown(stage, done, total)
            tell_progress(stage, done, total)

        progress("importing torch and transformers", 0, 0)
        from offmoe.api import load_engine

        hush_libraries()
        if prompt is not None:
            progress("counting the prompt's tokens", 0, 0)
            refuse_long_prompt(folder, make_config(**options), prompt)
        engine = load_engine(folder, make_config(**options), baseline_bytes=baseline, progress=progress, tell=tell)
    if not quiet:
        click.echo(f"{engine.folder.name}: {engine.plan.line()}", err=True)
        for note in engine.stats().notes or ():
            click.echo(note, err=True)
    return engine


def refuse_long_prompt(folder: Path, config: EngineConfig, prompt: str) -> None:
    """Raise ContextLengthError for a prompt that the context has no room for, before any weight is read.

    A text of fewer bytes than the context has tokens is not looked at: no tokenizer makes more of it.
    """
    from offmoe.checkpoint.context_limit import context_limit
    from offmoe.checkpoint.index import read_config
    from offmoe.engine.prompt import check_room, encode_prompt
    from offmoe.hf.tokens.tokenizer import load_tokenizer
    from offmoe.memory.auto import DEFAULT_CONTEXT_LENGTH

    longest = context_limit(read_config(folder))
    context = config.context_length or min(DEFAULT_CONTEXT_LENGTH, longest or DEFAULT_CONTEXT_LENGTH)
    if len(prompt.encode(errors="replace")) < context:
        return
    tokenizer = load_tokenizer(folder, trust_remote_code=config.trust_remote_code)
    if tokenizer is not None:
        check_room(len(encode_prompt(prompt, tokenizer, vocab_size=len(tokenizer))), context, longest)


def saved_flags(folder: Path, options: dict[str, Any]) -> SavedFlags | None:
    """Flags that --config's file, or the user's own, has for the model in `folder`; `options` win.

    An own file that cannot be used is warned of; one that the user named raises UsageError.
    """
    named = named_config()
    path = default_path() if named is None else Path(named)
    if named == "off" or (named is None and not path.is_file()):
        return None
    try:
        return read_flags(path, model_hash(folder), options)
    except UsageError as error:
        if named is not None:
            raise
        click.echo(f"warning: {error}", err=True)
        return None


def hush_libraries() -> None:
    """transformers' advice would mix with the reply; its errors are raised, not logged."""
    from offmoe.hf.door import log_errors_only

    log_errors_only()


class PromptProgress(ProgressReporter):
    """Progress of a prompt that `engine` reads: tokens, bytes from disk since this was made, time left."""

    def __init__(self, engine: Engine, *, quiet: bool = False) -> None:
        begin = engine.stats().disk_bytes
        super().__init__(quiet=quiet, detail=lambda: f"{format_traffic(engine.stats().disk_bytes - begin)} read")

    def show(self, done: int, total: int) -> None:
        """For `on_prefill`. Once all is read the bar goes: text comes next, perhaps on the same terminal."""
        if done < total:
            self(f"{total} tokens to read", done, total)
        else:
            self.close()


def print_stream(chunks: Stream) -> Chunk:
    """Write text as it comes; returns the last chunk. Closes the stream whatever happens."""
    last = None
    with chunks:
        try:
            for last in chunks:
                sys.stdout.write(last.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            raise
    assert last is not None, "a stream has a last chunk"
    return last


def say_figures(engine: Engine, stats: GenerationStats, more: str = "") -> None:
    """One line on standard error after a reply; two with --verbose, none with --quiet."""
    level = verbosity()
    if level >= 0:
        say((stats.line() if level else stats.short_line()) + more, dim=True)
    if level > 0:
        say(peak_line(engine), dim=True)


def peak_line(engine: Engine) -> str:
    """Measured peak against the budget, and the same of the device where there is one."""
    totals = engine.stats()
    line = f"memory: {_peak(totals, 'peak_rss_growth_bytes', 'planned_bytes', 'ram_bytes')}"
    if totals.device is not None:
        numbers = _peak(totals, "device_peak_bytes", "device_planned_bytes", "vram_bytes")
        line += f"; {totals.device}: {numbers}, {totals.device_slots} expert slots"
    return line


def _peak(totals: EngineStats, *names: str) -> str:
    sizes = ("not counted" if totals[name] is None else format_bytes(totals[name]) for name in names)
    return ", ".join(f"{what} {size}" for what, size in zip(("peak", "planned", "budget"), sizes, strict=True))
