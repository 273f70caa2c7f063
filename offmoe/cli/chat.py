"""`offmoe chat`: read a line, stream the reply, one line of statistics."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from offmoe.base.errors import ContextLengthError, UsageError
from offmoe.cli.interrupt import StopRequest
from offmoe.report.progress import ProgressReporter

if TYPE_CHECKING:
    from offmoe.generation.chat import Message
    from offmoe.generation.engine import Engine

_EXITS = ("/exit", "/quit")


def run_chat(engine: Engine, *, system: str | None, options: dict[str, Any]) -> None:
    """Until end of input or /exit. Ctrl-C stops the reply and keeps the conversation."""
    if engine.tokenizer is None:
        raise UsageError(f"{engine.folder} has no tokenizer, which a conversation needs")
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history in input()
        click.echo("Ctrl-C stops a reply; /exit leaves.", err=True)
        if engine.tokenizer.chat_template is None:
            click.echo("This model has no chat template: turns are joined by newlines.", err=True)
    chat = _Chat(engine, system, options, interactive=interactive)
    while True:
        try:
            return chat.run()
        except KeyboardInterrupt:  # at the prompt, or the second one in a reply: a new prompt
            pass


class _Chat:
    """The conversation so far; `messages` always ends with a whole exchange."""

    def __init__(self, engine: Engine, system: str | None, options: dict[str, Any], *, interactive: bool) -> None:
        self._engine, self._options, self._interactive = engine, options, interactive
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._at_line_start = True

    def run(self) -> None:
        """Exchange after exchange. Raises KeyboardInterrupt, after which it may be called again."""
        while True:
            if not self._at_line_start:
                self._at_line_start = True
                click.echo(err=True)
            line = self._read_line()
            if line is None or line.strip() in _EXITS:
                return
            if line.strip():
                self._exchange(line)

    def _read_line(self) -> str | None:
        """The next line; None at the end of input."""
        self._at_line_start = False
        try:
            line = input("> " if self._interactive else "")
        except EOFError:
            line = None
            if self._interactive:
                click.echo(err=True)
        except UnicodeDecodeError as error:
            raise UsageError(f"the input is no {error.encoding} text ({error.reason}); convert it first") from None
        self._at_line_start = True
        return line

    def _exchange(self, line: str) -> None:
        asked: list[Message] = [*self._messages, {"role": "user", "content": line}]
        try:
            reply = self._answer(asked)
        except (ContextLengthError, UsageError) as error:
            if not self._interactive:
                raise
            click.echo(f"error: {error}; /exit and start again", err=True)
            return
        if reply:  # when nothing was said: two user turns in a row would break many templates
            self._messages = [*asked, {"role": "assistant", "content": reply}]

    def _answer(self, messages: list[Message]) -> str:
        """Stream one reply; returns what was said, also when Ctrl-C cut it short."""
        said: list[str] = []
        line = ""
        with StopRequest() as stop, ProgressReporter() as progress:

            def on_prefill(done: int, total: int) -> None:
                progress("prompt", done, total)
                stop.check()

            pieces = self._engine.stream_chat(messages, on_prefill=on_prefill, **self._options)
            self._at_line_start = False
            try:
                for piece in pieces:
                    progress.close()
                    said.append(piece.text)
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
                    line = piece.stats.line() if piece.stats is not None else line
                    stop.check()
            except KeyboardInterrupt:
                line = "[stopped]"
            finally:
                pieces.close()  # type: ignore[attr-defined]
        click.echo()
        self._at_line_start = True
        click.echo(line, err=True)
        return "".join(said).strip()
