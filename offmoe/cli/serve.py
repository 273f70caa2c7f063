"""`offmoe serve`: flags to settings, the address first, the model while it answers that it is loading."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import click

from offmoe.cli.options import engine_options, process_baseline_bytes, split_engine_options, user_errors
from offmoe.core.errors import UsageError
from offmoe.server.settings import ServerSettings, make_server_settings, read_keys

_KEY_VARIABLE = "OFFMOE_API_KEY"


@click.command()
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File with keys, one a line, of which a request needs one. Or OFFMOE_API_KEY in the environment.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Another name of this machine that a Host header may have. May be given more than once.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="URL",
    help="Origin whose web pages may call the server. May be given more than once.",
)
@click.option("--model-name", metavar="NAME", help="Name of the model in the API. Default: that of its folder.")
@click.option("--alias", "aliases", multiple=True, metavar="NAME", help="Another name that requests may use for it.")
@click.option("--queue-size", type=click.IntRange(1), metavar="N", help="Requests that may wait.  [default: 32]")
@click.option("--timeout", "timeout_s", type=float, metavar="SECONDS", help="Time that a request may take.")
@click.option("--max-body", "max_body_bytes", metavar="SIZE", help="Size of a request.  [default: 16MiB]")
@click.option("--share-prompts", is_flag=True, help="Kept prompts are shared between API keys.")
@click.option("--no-web", is_flag=True, help="Without the page at /.")
@click.option("--log-requests", is_flag=True, help="A line for each request on standard error, without its text.")
@engine_options
@user_errors
def serve(model: str | None, api_key_file: Path | None, log_requests: bool, no_web: bool, **options: Any) -> None:
    """Serve the OpenAI and Anthropic APIs, and a web page, on this machine."""
    engine_given, given = split_engine_options(options)
    if "max_body_bytes" in given:
        from offmoe.core.units import parse_size

        given["max_body_bytes"] = parse_size(given["max_body_bytes"], name="max_body")
    settings = make_server_settings(api_keys=_keys(api_key_file), web_page=not no_web, **given)
    run_server(model, engine_given, settings, log_requests=log_requests)


def _keys(path: Path | None) -> tuple[str, ...]:
    named = tuple(key for key in os.environ.get(_KEY_VARIABLE, "").split(",") if key)
    return named + (read_keys(path) if path is not None else ())


def run_server(
    model: str | None, engine_given: dict[str, Any], settings: ServerSettings, *, log_requests: bool = False
) -> None:
    """Listen, load, serve until a signal. Raises UsageError before anything is loaded."""
    from offmoe.cli.session import check_request, open_engine

    folder = check_request(model, engine_given)
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"the server needs {name}: pip install 'offmoe[serve]'")
    from offmoe.server.serve import RunningServer

    baseline = process_baseline_bytes()
    context = click.get_current_context()

    def load(progress: Any) -> Any:
        with context.scope():  # of this thread: flags that were saved for the model are found through it
            return open_engine(model, engine_given, baseline_bytes=baseline, tell_progress=progress)

    _write_log(requests=log_requests)
    server = RunningServer(settings, load, name=settings.model_name or folder.name)
    click.echo(f"listening on {server.url} (OpenAI: {server.url}/v1), the model is loading", err=True)
    server.run()


class _ServerLines(logging.Handler):
    """Lines of the server on standard error: requests where they are wanted, and where a failure came from."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:  # the lines of warnings are written by the package's handler
            click.echo(record.getMessage(), err=True)
        if record.exc_info is not None:
            click.echo(logging.Formatter().formatException(record.exc_info), err=True)


def _write_log(*, requests: bool) -> None:
    logger = logging.getLogger("offmoe.server")
    logger.setLevel(logging.INFO if requests else logging.WARNING)
    logger.addHandler(_ServerLines())
