"""The door from an engine to a server around it, for notebooks. The server stands above: it is found by its name."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol


class LiveServer(Protocol):
    """A server that runs on a thread of its own. Leaving a `with` statement closes it; the engine stays open."""

    url: str

    def close(self) -> None:
        """End the server; the reply under way ends with what it has."""

    def __enter__(self) -> LiveServer: ...

    def __exit__(self, *raised: object) -> None: ...


def start_server(engine: object, options: dict[str, Any]) -> LiveServer:
    """Serve `engine`. Raises UsageError for an option that is none, and where the address cannot be listened on."""
    started: LiveServer = import_module("offmoe.server.notebook").serve_engine(engine, **options)
    return started
