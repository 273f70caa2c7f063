"""How the command behaves as a whole: one line for a mistake, exit code 2, and no library imported to say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click


class OneLineGroup(click.Group):
    """A group whose usage errors are one `error: ...` line on stderr, as all other errors are."""

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
        raise _OneLineError(f"{message[:1].lower()}{message[1:]}; see {command} --help") from None
