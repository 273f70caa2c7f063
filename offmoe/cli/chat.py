"""`offmoe chat`: read a line, stream the reply, one line of statistics."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from offmoe.base.errors import ContextLengthError
from offmoe.report.progress import ProgressReporter

if TYPE_CHECKING:
    from offmoe.generation.chat import Message
    from offmoe.generation.engine import Engine

_EXITS = ("/exit", "/quit")


def run_chat(engine: Engine, *, system: str | None, options: dict[str, Any]) -> None:
    """Until end of input or /exit. Ctrl-C stops the reply and keeps the conversation."""
    interactive = sys.stdin.isatty()
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    if interactive:
        click.echo("Ctrl-C stops a reply; /exit leaves.", err=True)
        if engine.tokenizer is not None and engine.tokenizer.chat_template is None:
            click.echo("This model has no chat template: turns are joined by newlines.", err=True)
    while (line := _read_line(interactive)) is not None:
        if line.strip() in _EXITS:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        reply = _answer(engine, messages, options)
        if reply:
            messages.append({"role": "assistant", "content": reply})
        else:
            messages.pop()  # nothing was said: two user turns in a row would break many templates


def _read_line(interactive: bool) -> str | None:
    """The next line; None at the end of input. Ctrl-C at the prompt clears the line."""
    while True:
        try:
            return input("> " if interactive else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            click.echo(err=True)


def _answer(engine: Engine, messages: list[Message], options: dict[str, Any]) -> str:
    """Stream one reply; returns what was said, also when Ctrl-C cut it short."""
    said: list[str] = []
    stats = None
    try:
        with ProgressReporter() as progress:
            pieces = engine.stream_chat(
                messages, on_prefill=lambda done, total: progress("prompt", done, total), **options
            )
            try:
                for piece in pieces:
                    progress.close()
                    said.append(piece.text)
                    stats = piece.stats
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
            finally:
                pieces.close()  # type: ignore[attr-defined]
    except KeyboardInterrupt:
        click.echo(" [stopped]", nl=False, err=True)
    except ContextLengthError as error:
        click.echo(f"error: {error}; /exit and start again", err=True)
    click.echo()
    if stats is not None:
        click.echo(stats.line(), err=True)
    return "".join(said).strip()
