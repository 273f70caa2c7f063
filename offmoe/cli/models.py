"""The commands about models on this machine: `list`, `pull`, `rm` and `show`."""

from __future__ import annotations

import shutil
import sys

import click

from offmoe.cli.options import REVISION_HELP, json_option, print_json, user_errors, verbosity_options
from offmoe.core.errors import ModelNotFoundError, OutputError, UsageError
from offmoe.core.units import format_bytes


@click.command("list")
@json_option
@user_errors
def list_models(as_json: bool) -> None:
    """Models of the hub that are here, in the cache that all programs of the hub share, and the bundled one."""
    from offmoe.checkpoint.hub.cache import cache_root, cached_models
    from offmoe.checkpoint.locate import demo_model_folder

    demo = sum(path.stat().st_size for path in demo_model_folder().iterdir() if path.is_file())
    found = cached_models()
    if as_json:
        rows = [{"model": row.hub_id, "bytes": row.num_bytes, "whole": row.is_whole} for row in found]
        print_json({"models": [{"model": "demo", "bytes": demo, "whole": True}, *rows], "cache": str(cache_root())})
        return
    shown = [("demo", format_bytes(demo), "bundled")]
    shown += [(row.hub_id, format_bytes(row.num_bytes), "" if row.is_whole else "in part") for row in found]
    width = max(len(name) for name, _, _ in shown)
    for name, size, state in shown:
        click.echo(f"{name:<{width}}  {size:>10}  {state}".rstrip())


@click.command()
@click.argument("model")
@click.option("--revision", metavar="NAME", help=REVISION_HELP)
@click.option("--trust-remote-code", is_flag=True, help="Fetch Python code that comes with the model, too.")
@verbosity_options
@user_errors
def pull(model: str, revision: str | None, trust_remote_code: bool) -> None:
    """Fetch MODEL from the hub. A model that cannot run here is refused before its weights are fetched."""
    from offmoe.checkpoint.locate import is_hub_id
    from offmoe.cli.session import check_request

    if not is_hub_id(model):
        raise UsageError(f"{model} is no name on the hub; use OWNER/NAME, OWNER/NAME:Q4_K_M or a link of it")
    options = {"revision": revision, "trust_remote_code": trust_remote_code or None}
    click.echo(check_request(model, {name: value for name, value in options.items() if value is not None}))


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@user_errors
def rm(models: tuple[str, ...], yes: bool) -> None:
    """Remove models of the hub from the cache, with all their revisions. Other programs use the same cache."""
    from offmoe.checkpoint.hub.cache import cache_root, cached_models
    from offmoe.checkpoint.locate import plain_name

    there = {row.hub_id.lower(): row for row in cached_models()}
    for model in models:
        row = there.get(plain_name(model).lower())
        if row is None:
            raise ModelNotFoundError(f"{model} is not in the cache {cache_root()}; offmoe list names what is")
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError("rm asks before it removes, and there is nobody to ask; use --yes")
            if not click.confirm(f"remove {row.hub_id}, {format_bytes(row.num_bytes)}?", err=True):
                continue
        try:
            shutil.rmtree(row.root)
        except OSError as error:
            raise OutputError(f"{row.root} cannot be removed: {error.strerror or error}") from None
        click.echo(f"removed {row.hub_id}, {format_bytes(row.num_bytes)}")
