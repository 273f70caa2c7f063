"""Settings of a server, checked before a model is loaded. Imports no web framework."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offmoe.core.errors import UsageError
from offmoe.core.files import read_text_bounded

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_KEY = re.compile(r"[\x21-\x7e]{8,512}")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")
_HOST_NAME = re.compile(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of `offmoe serve`; sizes in bytes, times in seconds. Made by `make_server_settings`.

    host, port        address that is listened on; port 0: any free one
    api_keys          keys of which a request has to name one; none: no key is asked for
    allowed_hosts     names that a Host header may have, besides localhost and the address itself
    cors_origins      origins whose web pages may call this server
    model_name        name of the model in the API; default: the name of its folder
    aliases           other names that requests may use for it
    queue_size        requests that may wait
    timeout_s         time that one request may take from its begin in the engine; None: any
    max_body_bytes    size of a request
    max_messages      messages of a conversation, or items of an input
    max_n             replies to one request
    max_tools         tools of a request
    max_schema_bytes  size of a JSON schema or grammar
    max_depth         depth of JSON in a request
    body_timeout_s    time in which a request has to arrive
    write_timeout_s   time that a client may go without reading
    max_connections   connections at once
    web_page          serve the page at `/`
    share_prompts     kept prompts are shared between keys
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    model_name: str | None = None
    aliases: tuple[str, ...] = ()
    queue_size: int = 32
    timeout_s: float | None = None
    max_body_bytes: int = 16 << 20
    max_messages: int = 4096
    max_n: int = 16
    max_tools: int = 256
    max_schema_bytes: int = 256 << 10
    max_depth: int = 64
    body_timeout_s: float = 30.0
    write_timeout_s: float = 300.0
    max_connections: int = 256
    web_page: bool = True
    share_prompts: bool = False

    @property
    def is_local(self) -> bool:
        """Only this machine can reach the address."""
        return is_loopback(self.host)


def make_server_settings(**options: Any) -> ServerSettings:
    """Check options as a user writes them. Raises UsageError.

    An address beyond this machine needs a key, and a name that is listened to on all addresses needs allowed hosts only
    where it is called by another name than its address.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("api_keys", "allowed_hosts", "cors_origins", "aliases"):
        if name in given:
            given[name] = tuple(dict.fromkeys(given[name]))
    settings = ServerSettings(**given)
    if not 0 <= settings.port <= 65535:
        raise UsageError(f"port is {settings.port}; use 0 to 65535")
    if settings.queue_size < 1:
        raise UsageError(f"queue_size is {settings.queue_size}; use at least 1")
    if settings.timeout_s is not None and settings.timeout_s <= 0:
        raise UsageError(f"timeout_s is {settings.timeout_s:g}; use a number above 0")
    for key in settings.api_keys:
        if not _KEY.fullmatch(key):  # which one is not told: errors are logged
            raise UsageError("an API key is too short or has other than printable ASCII characters; use 8 to 512")
    for origin in settings.cors_origins:
        if not _ORIGIN.fullmatch(origin):
            raise UsageError(f"origin {origin!r} is none; use one like https://example.org, without a path")
    for name in settings.allowed_hosts:
        if not _HOST_NAME.fullmatch(name):
            raise UsageError(f"host {name!r} is none; use a name or an address without a port")
    if not settings.is_local and not settings.api_keys:
        raise UsageError(
            f"{settings.host} can be reached from other machines; give --api-key-file (or OFFMOE_API_KEY), or listen "
            "on 127.0.0.1"
        )
    return settings


def is_loopback(host: str) -> bool:
    """Only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def host_names(settings: ServerSettings) -> frozenset[str]:
    """Names that the Host header of a request may have, in lower case, without a port."""
    own = f"[{settings.host}]" if ":" in settings.host else settings.host
    names: Iterable[str] = (*_LOOPBACK_NAMES, own, *settings.allowed_hosts)
    return frozenset(name.lower() for name in names)


def read_keys(path: Path) -> tuple[str, ...]:
    """Keys of a file, one a line; empty lines and lines that begin with # are none. Raises UsageError."""
    lines = (line.strip() for line in read_text_bounded(path, "--api-key-file").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UsageError(f"--api-key-file {path} has no key; write one a line")
    return keys
