"""Checks before every endpoint: names of hosts and origins, keys, kinds and sizes of bodies. Pure ASGI.

Threat and answer, one a check: DNS rebinding (the Host list), web pages of others (no CORS, foreign origins refused, a
content type that a page cannot send without asking first), guessed keys (compared in constant time), bodies that are
too large or never end.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offmoe.server.errors import ApiError, as_api_error, error_body
from offmoe.server.settings import ServerSettings, host_names

_log = logging.getLogger("offmoe.server")
# Answered without a key: they tell nothing of anybody's.
_OPEN_PATHS = ("/health", "/", "/favicon.ico")
_OPEN_FOLDER = "/static/"
_CORS_METHODS, _CORS_HEADERS = "GET, POST, OPTIONS", "authorization, content-type, x-api-key, anthropic-version"
_SAFE_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


class Guard:
    """ASGI middleware in front of `app`. `answered(path, status)` is told of each response."""

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, answered: Callable[[str, int], None],
        known_paths: frozenset[str],
    ) -> None:  # fmt: skip
        self._app, self._settings, self._answered, self._known_paths = app, settings, answered, known_paths
        self._hosts = host_names(settings)
        self._keys = tuple(key.encode() for key in settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets
        headers = _Headers(scope)
        begun, status = time.monotonic(), 0
        origin = headers.get("origin")

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_SAFE_HEADERS, *self._cors(origin)]}
            await send(message)

        try:
            if await self._preflight(scope, headers, noted):
                return
            self._check(scope, headers)
            body = await self._body(headers, receive) if scope["method"] == "POST" else b""
            await self._app(scope, _replay(body, receive), noted)
        except ApiError as error:
            await _send_error(noted, error, scope["path"])
        except Exception as error:  # noqa: BLE001 - a failed request never takes the server down
            _log.error("a request failed", exc_info=error)
            if not status:  # else the response has begun: its connection is closed, by which the client knows
                await _send_error(noted, as_api_error(error), scope["path"])
        finally:
            path = scope["path"] if scope["path"] in self._known_paths else "other"
            self._answered(path, status)
            _log.info("%s %s %d %.3f s", scope["method"], path, status, time.monotonic() - begun)

    def _check(self, scope: Scope, headers: _Headers) -> None:
        """Raise ApiError for a request that is not let in."""
        hosts = headers.all("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else None
        if name not in self._hosts:
            raise ApiError(
                403, "the Host header names a host that this server is not; add it with --allowed-host",
                kind="permission_error", code="host_not_allowed",
            )  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, hosts[0]) and origin not in self._settings.cors_origins:
            raise ApiError(
                403, "pages of this origin may not call the server; allow them with --cors-origin",
                kind="permission_error", code="origin_not_allowed",
            )  # fmt: skip
        path = scope["path"]
        if self._keys and path not in _OPEN_PATHS and not path.startswith(_OPEN_FOLDER):
            key = _key(headers)
            # All are compared, so that the time tells nothing.
            found = [hmac.compare_digest(key.encode("utf-8", "replace"), known) for known in self._keys]
            if not any(found):
                raise ApiError(
                    401, "the API key is missing or wrong: use Authorization: Bearer KEY, or x-api-key",
                    kind="authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
            scope.setdefault("state", {})["api_key"] = key
        if scope["method"] == "POST":
            kind = (headers.get("content-type") or "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "the content type has to be application/json", code="unsupported_media_type")

    def _is_own(self, origin: str, host: str) -> bool:
        """The page comes from this server itself."""
        return urlsplit(origin).netloc.lower() == host.lower() and origin.startswith(("http://", "https://"))

    async def _preflight(self, scope: Scope, headers: _Headers, send: Send) -> bool:
        """Answer a browser's question whether a page of an allowed origin may call."""
        origin = headers.get("origin")
        if scope["method"] != "OPTIONS" or origin is None or origin not in self._settings.cors_origins:
            return False
        allowed = [
            (b"access-control-allow-methods", _CORS_METHODS.encode()),
            (b"access-control-allow-headers", _CORS_HEADERS.encode()), (b"access-control-max-age", b"600"),
        ]  # fmt: skip
        await send({"type": "http.response.start", "status": 204, "headers": allowed})
        await send({"type": "http.response.body", "body": b""})
        return True

    def _cors(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        if origin is None or origin not in self._settings.cors_origins:
            return []
        return [(b"access-control-allow-origin", origin.encode()), (b"vary", b"Origin")]

    async def _body(self, headers: _Headers, receive: Receive) -> bytes:
        """All of the body. Raises ApiError where it is too large or too slow."""
        most = self._settings.max_body_bytes
        too_large = ApiError(413, f"the request has more than {most} bytes", code="request_too_large")
        length = headers.get("content-length")
        if length is not None and length.isdigit() and int(length) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        deadline = asyncio.get_running_loop().time() + self._settings.body_timeout_s
        while True:
            left = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, left))
            except (TimeoutError, asyncio.TimeoutError):
                raise ApiError(
                    408, f"the request took more than {self._settings.body_timeout_s:g} s to arrive",
                    kind="timeout_error", code="request_timeout", headers={"Connection": "close"},
                ) from None  # fmt: skip
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client left")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)


class _Headers:
    def __init__(self, scope: Scope) -> None:
        self._pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]

    def all(self, name: str) -> list[str]:
        return [value for other, value in self._pairs if other == name]

    def get(self, name: str) -> str | None:
        return next(iter(self.all(name)), None)


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()


def _key(headers: _Headers) -> str:
    scheme, _, key = (headers.get("authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key") or ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then whatever comes."""
    told = False

    async def replayed() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _send_error(send: Send, error: ApiError, path: str) -> None:
    pairs = {"content-type": "application/json", **error.headers}
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error_body(error, path)).encode()})
