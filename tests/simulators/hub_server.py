"""A hub of one model on this machine: addresses, headers and redirects as of huggingface.co, and a log of requests."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Request:
    """`host` is "hub" or "store", where the hub sends on to for weights. `token`: the Authorization header."""

    host: str
    path: str
    range: str | None
    token: str | None


@dataclass
class FakeHub:
    """Serves `folder` as the model `hub_id`. What is set here holds for the next request."""

    folder: Path
    hub_id: str = "someone/tiny"
    revision: str = "main"
    former_id: str | None = None
    token: str | None = None  # needed where it is set
    refusal: str = "GatedRepo"
    sizes: bool = True  # in the listing
    break_after: int | None = None  # bytes of a large file, after which the connection is closed
    requests: list[Request] = field(default_factory=list)
    sent_bytes: int = 0
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['hub']}"

    def asked(self) -> list[str]:
        """Names of the files that were asked for, in order, each once."""
        names = [request.path.split(f"/resolve/{COMMIT}/")[-1] for request in self.requests if request.host == "hub"]
        return list(dict.fromkeys(name.split("/resolve/main/")[-1] for name in names if "/api/" not in name))

    def listing(self) -> dict[str, Any]:
        siblings = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                entry: dict[str, Any] = {"rfilename": path.relative_to(self.folder).as_posix()}
                if self.sizes:
                    entry |= {"size": path.stat().st_size, "blobId": digest(path)[:40]}
                    if is_large(path):
                        entry["lfs"] = {"sha256": digest(path), "size": path.stat().st_size, "pointerSize": 134}
                siblings.append(entry)
        return {"id": self.hub_id, "sha": COMMIT, "siblings": siblings}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_large(path: Path) -> bool:
    return path.suffix in {".safetensors", ".gguf", ".bin", ".pth"}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    host: str
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        token = self.headers.get("Authorization")
        hub.requests.append(Request(self.host, path, self.headers.get("Range"), token))
        if self.host == "store":
            self._send(hub.folder / path.removeprefix("/store/"))
            return
        if hub.former_id is not None and hub.former_id in path:
            self._answer(307, {"Location": self.path.replace(hub.former_id, hub.hub_id)})
        elif hub.token is not None and token != f"Bearer {hub.token}":
            self._answer(401 if token is None else 403, {"X-Error-Code": hub.refusal})
        elif path == f"/api/models/{hub.hub_id}/revision/{hub.revision}":
            self._answer(200, {"Content-Type": "application/json"}, json.dumps(hub.listing()).encode())
        elif path.startswith(f"/api/models/{hub.hub_id}/revision/"):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._file(path)

    do_HEAD = do_GET

    def _file(self, path: str) -> None:
        for revision in (self.hub.revision, COMMIT):
            prefix = f"/{self.hub.hub_id}/resolve/{revision}/"
            if path.startswith(prefix):
                file = self.hub.folder / path.removeprefix(prefix)
                if not file.is_file():
                    self._answer(404, {"X-Error-Code": "EntryNotFound"})
                elif is_large(file):
                    location = f"http://127.0.0.1:{self.hub.ports['store']}/store/{path.removeprefix(prefix)}"
                    self._answer(
                        302,
                        {
                            "Location": location,
                            "X-Linked-Etag": f'"{digest(file)}"',
                            "X-Linked-Size": str(file.stat().st_size),
                        },
                    )
                else:
                    self._send(file)
                return
        self._answer(404, {"X-Error-Code": "RepoNotFound"})

    def _send(self, path: Path) -> None:
        data, asked = path.read_bytes(), self.headers.get("Range")
        begin, _, last = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(begin) : int(last) + 1 if last else len(data)]
        tag = f"store-{path.name}" if self.host == "store" else digest(path)[:40]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{int(begin) + len(part) - 1}/{len(data)}"
        self._answer(206 if asked else 200, headers, part)

    def _answer(self, status: int, headers: dict[str, str], data: bytes = b"") -> None:
        hub = self.hub
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.host == "store" and hub.break_after is not None and len(data) > hub.break_after:
            data, self.close_connection = data[: hub.break_after], True
        if self.command != "HEAD":
            hub.sent_bytes += len(data)
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@contextmanager
def serve(folder: Path, **settings: Any) -> Iterator[FakeHub]:
    """Within: a hub on one port, and the store of its large files on another."""
    hub = FakeHub(folder, **settings)
    servers = []
    for host in ("hub", "store"):
        handler = type(host, (_Handler,), {"hub": hub, "host": host})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        hub.ports[host] = server.server_port
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
