"""From the flags of `offmoe chat` to a chat."""

from __future__ import annotations

import os
from typing import Any

from offmoe.base.errors import UsageError
from offmoe.cli.options import read_stdin, split_engine_options
from offmoe.cli.session import check_request, open_engine

DASH = "-"


def start_chat(model: str | None, dash: str | None, options: dict[str, Any]) -> None:
    """Load and talk. `model` may be the dash. Raises UsageError before anything heavy is imported."""
    if model == DASH:
        model, dash = dash, DASH
    if dash not in {None, DASH}:
        raise UsageError(f'{dash!r} is one argument too many; use MODEL, and "-" to read a message from standard input')
    engine_given, others = split_engine_options(options)
    style = {
        "color": not others.pop("no_color") and not os.environ.get("NO_COLOR"), "markdown": not others.pop("plain"),
        "as_json": others.pop("as_json"), "keep_history": not others.pop("no_history"),
    }  # fmt: skip
    system = others.pop("system", None)
    check_request(model, engine_given, quiet=style["as_json"])
    message = read_stdin() if dash else None
    if message is not None and not message.strip():
        raise UsageError("standard input is empty; give a message")
    with open_engine(model, engine_given) as engine:
        from offmoe.cli.chat import ChatStyle, run_chat

        run_chat(engine, system=system, options=others, style=ChatStyle(**style), message=message)
