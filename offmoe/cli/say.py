"""Messages of a command beside its output: on standard error, wrapped at words where a terminal shows it."""

from __future__ import annotations

import shutil
import sys
import textwrap

import click

from offmoe.report.reply_view import is_smart_terminal


def say(line: str, *, dim: bool = False, indent: str = "") -> None:
    """One line, or more of them on a narrow terminal, then indented by `indent`."""
    if is_smart_terminal(sys.stderr):
        width = max(20, shutil.get_terminal_size().columns - 1)
        line = "\n".join(textwrap.wrap(line, width, subsequent_indent=indent)) or line
        line = click.style(line, dim=True) if dim else line
    click.echo(line, err=True)
