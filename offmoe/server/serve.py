"""Run the server: a socket first, then the model on its own thread, then requests until somebody ends it."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from offmoe.core.errors import UsageError
from offmoe.engine.engine import Engine
from offmoe.server.app import make_app
from offmoe.server.protocol import PatientProtocol
from offmoe.server.settings import ServerSettings
from offmoe.server.state import ServedModel

Load = Callable[[Callable[[str, int, int], None]], Engine]
# After the running reply was cut, connections have so long to take it.
_GRACE_S = 5
_BACKLOG = 128


class HttpServer(uvicorn.Server):
    """uvicorn, which ends the running reply when it is asked to end itself."""

    def __init__(self, config: uvicorn.Config, served: ServedModel) -> None:
        super().__init__(config)
        self._served = served

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the running reply ends with what it has."""
        threading.Thread(target=self._served.queue.close, name="offmoe-server-end", daemon=True).start()
        super().handle_exit(sig, frame)

    def ask_to_end(self) -> None:
        """End, from any thread."""
        self._served.queue.close()
        self.should_exit = True


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UsageError where the port is taken or may not be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    name = host.strip("[]")
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((name, port))
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise UsageError(_why_not(error, host, port)) from None
    return listening


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; choose another one with --port, or end the server that has it"
    if error.errno == errno.EACCES:
        return f"port {port} may not be opened by this user; choose one above 1023 with --port"
    return f"{host} port {port} cannot be listened on: {error.strerror or error}"


def url_of(listening: socket.socket) -> str:
    """The address for a browser."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


class RunningServer:
    """A server around a model. `run` serves on the calling thread; `start` on one of its own, for notebooks."""

    def __init__(self, settings: ServerSettings, load: Load, *, name: str, closes_engine: bool = True) -> None:
        """Raises UsageError where the address cannot be listened on; nothing is loaded before `run` or `start`."""
        self._socket = open_socket(settings.host, settings.port)
        self.url = url_of(self._socket)
        self.served = ServedModel(settings, load, name=name, closes_engine=closes_engine, on_failure=self._end)
        config = uvicorn.Config(
            make_app(self.served), http=PatientProtocol, ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, date_header=True, limit_concurrency=settings.max_connections, backlog=_BACKLOG,
            timeout_keep_alive=75, timeout_graceful_shutdown=_GRACE_S, proxy_headers=False,
        )  # fmt: skip
        self._server = HttpServer(config, self.served)
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<RunningServer {self.url}>"

    def _end(self) -> None:
        self._server.ask_to_end()

    def run(self) -> None:
        """Load and serve until a signal. Raises what the load raised."""
        self.served.start()
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()
            self.served.close()
        if self.served.error is not None:
            raise self.served.error

    def start(self) -> None:
        """Serve on a thread of its own, until `close`."""
        self._thread = threading.Thread(target=self.run, name="offmoe-server", daemon=True)
        self._thread.start()

    def wait_until_loaded(self) -> None:
        """Return when the model is there. Raises what the load raised."""
        self.served.loaded.wait()
        if self.served.error is not None:
            raise self.served.error

    def close(self) -> None:
        """End the server; the running reply ends with what it has. A second close does nothing."""
        self._server.ask_to_end()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
