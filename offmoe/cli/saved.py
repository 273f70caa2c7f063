"""`offmoe tune --show` and `--forget`: the flags that were saved for the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from offmoe.checkpoint.identity import model_hash
from offmoe.cli.session import check_request
from offmoe.core.errors import UsageError
from offmoe.core.saved_flags import all_saved, default_path, forget_flags, read_flags


def show_saved(model: str | None, *, forget: bool, config: str | None, quiet: bool) -> dict[str, Any]:
    """Say what the file `config` (None: the user's own) has for `model`, None for all; with `forget` take it out.

    Without `model`, `forget` means the bundled model. Returns the flags by model.
    """
    if config == "off":
        raise UsageError("--config off names no file; leave it out, or name one")
    path = default_path() if config is None else Path(config)
    if model is None and not forget:
        every = all_saved(path)
        if not quiet:
            click.echo("\n".join(f"{name}: {saved.line()}" for name, saved in every.items()) or f"none in {path}")
        return {"models": {name: saved.flags for name, saved in every.items()}}
    folder = check_request(model, {}, quiet=quiet)
    identity = model_hash(folder)
    saved = read_flags(path, identity, {}) if path.is_file() else None
    flags = {} if saved is None else saved.flags
    if forget:
        is_there = forget_flags(path, identity)
        if not quiet:
            click.echo(f"{folder.name}: {'forgotten' if is_there else 'nothing was saved'} in {path}")
        return {"forgotten": {folder.name: flags}}
    if not quiet:
        click.echo(f"{folder.name}: {'nothing is saved' if saved is None else saved.line()}")
    return {"models": {folder.name: flags}}
