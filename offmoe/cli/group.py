"""Behaviour of the command as a whole: one line for a mistake, exit code 2, and no library imported to say so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from offmoe.cli.streams import Terminated, ended_by_signals, prepare_streams
from offmoe.core.config import gone
from offmoe.core.errors import OutputError


class OneLineGroup(click.Group):
    """A group whose usage errors are one `error: ...` line on stderr, as all other errors are.

    Streams that are closed or full, SIGTERM and SIGHUP end it in order, with exit codes of their own.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line; ends in SystemExit."""
        prepare_streams()
        try:
            with ended_by_signals():
                try:
                    return super().main(*args, **kwargs)
                finally:
                    sys.stdout.flush()  # now, where it can still be told that it failed
        except Terminated:
            click.echo("stopped", err=True)
            raise
        except BrokenPipeError:
            sys.exit(1)
        except OutputError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the group's own arguments."""
        with _one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Parse the command's arguments and run it."""
        with _one_line_errors():
            return super().invoke(ctx)


class _OneLineError(click.ClickException):
    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True, file=file)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except _OneLineError:
        raise
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "offmoe"
        message = " ".join(error.format_message().split()).rstrip(".")
        if isinstance(error, click.NoSuchOption):
            message = gone(error.option_name.lstrip("-").replace("-", "_")) or message
        raise _OneLineError(f"{message[:1].lower()}{message[1:]}; see {command} --help") from None
