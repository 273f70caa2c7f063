"""A server around an engine that a program has open."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from typing import Any

from offmoe.core.config import refuse_unknown
from offmoe.core.errors import UsageError
from offmoe.engine.engine import Engine
from offmoe.server.settings import ServerSettings, make_server_settings


def serve_engine(engine: Engine, **options: Any) -> Any:
    """A RunningServer, which has begun. `options`: fields of ServerSettings. Raises UsageError."""
    refuse_unknown(options, tuple(field.name for field in fields(ServerSettings)))
    settings = make_server_settings(**options)
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"the server needs {name}: pip install 'offmoe[serve]'")
    from offmoe.server.serve import RunningServer

    server = RunningServer(
        settings, lambda progress: engine, name=settings.model_name or engine.folder.name, closes_engine=False
    )
    server.start()
    server.wait_until_loaded()
    return server
