"""Responses that are never silent: a stream of server-sent events, and JSON that begins late.

Both watch the connection: a client that leaves stops its job in the queue, in the prompt and in decoding. A client that
does not read for `write_timeout_s` counts as gone.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from offmoe.core.units import format_traffic
from offmoe.server.errors import ApiError, as_api_error
from offmoe.server.events import Event, PromptRead
from offmoe.server.jobs import JobQueue, ServerJob

# What proxies and clients that count silence get a byte in.
_COMMENT_S = 1.0
# A first answer within this time has its own status, if it is an error.
_FIRST_S = 0.8
# JSON replies begin with spaces after this.
_SPACE_S = 5.0


class SseForm(Protocol):
    """The form of one API for a stream: bytes of server-sent events."""

    def add(self, event: Event) -> Iterable[bytes]:
        """Events for the client."""

    def end(self) -> Iterable[bytes]:
        """After the last reply."""

    def error(self, error: ApiError) -> Iterable[bytes]:
        """In the place of the rest."""


class JsonForm(Protocol):
    """The form of one API for a reply as a whole."""

    def add(self, event: Event) -> None:
        """Take an event."""

    def body(self) -> dict[str, Any]:
        """The reply."""


def sse(value: Any, event: str | None = None) -> bytes:
    """One server-sent event with JSON."""
    name = f"event: {event}\n" if event is not None else ""
    return f"{name}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class JobResponse(Response):
    """Base of both: runs `_talk` beside a watch on the connection, and cancels the job whatever ends it."""

    def __init__(
        self, job: ServerJob, queue: JobQueue, *, write_timeout_s: float, on_left: Callable[[], None],
        to_error: Callable[[ApiError], dict[str, Any]],
    ) -> None:  # fmt: skip
        super().__init__()
        self.job, self._queue, self._write_timeout_s, self._on_left = job, queue, write_timeout_s, on_left
        self._to_error = to_error
        self._read: PromptRead | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""

        loop = asyncio.get_running_loop()

        async def bounded(message: Message) -> None:
            timer = loop.call_later(self._write_timeout_s, talk.cancel)
            try:
                await send(message)
            finally:
                timer.cancel()

        talk = asyncio.ensure_future(self._talk(bounded))
        watch = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({talk, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not talk.done() or talk.cancelled():
                self._on_left()
            else:
                talk.result()
        finally:
            self.job.cancel()
            for task in (talk, watch):
                task.cancel()
            await asyncio.gather(talk, watch, return_exceptions=True)

    async def _talk(self, send: Send) -> None:
        raise NotImplementedError

    async def _start(self, send: Send, status: int, kind: str, headers: dict[str, str] | None = None) -> None:
        named = {"content-type": kind, "cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})}
        encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
        self.status_code = status
        await send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _fail(self, send: Send, error: ApiError) -> None:
        """An error as the whole answer."""
        await self._start(send, error.status, "application/json", error.headers)
        await send({"type": "http.response.body", "body": json.dumps(self._to_error(error)).encode()})

    def waiting_line(self) -> str:
        """The step that the request waits for now, for people."""
        if self.job.begun is None:
            return f"in the queue, {self._queue.position(self.job)} before this"
        if (read := self._read) is None:
            return "begun"
        if read.done_tokens >= read.total_tokens:
            return "generating"
        left = ""
        if read.done_tokens and read.elapsed_s:
            left = f", about {read.elapsed_s / read.done_tokens * (read.total_tokens - read.done_tokens):.0f} s left"
        disk = f", {format_traffic(read.disk_bytes)} read" if read.disk_bytes else ""
        return f"prompt {read.done_tokens}/{read.total_tokens} tokens{disk}{left}"


class SseResponse(JobResponse):
    """Server-sent events: a comment at once and in every second without an event."""

    def __init__(self, job: ServerJob, queue: JobQueue, form: SseForm, **options: Any) -> None:
        super().__init__(job, queue, **options)
        self._form = form

    async def _talk(self, send: Send) -> None:
        events = await self._first()
        if (error := next((found for event in events if (found := _error_of(event)) is not None), None)) is not None:
            await self._fail(send, error)
            return
        await self._start(send, 200, "text/event-stream; charset=utf-8")
        await self._send(send, f": {self.waiting_line()}\n\n".encode())
        while True:
            blob, ended = self._bytes_of(events)
            if blob:
                await self._send(send, blob)
            if ended:
                break
            events = await self.job.take(_COMMENT_S)
            if not events:
                await self._send(send, f": {self.waiting_line()}\n\n".encode())
        await send({"type": "http.response.body", "body": b""})

    async def _first(self) -> list[Any]:
        """Events up to the first that says more than how much was read, or those of the first second."""
        clock = asyncio.get_running_loop().time
        events: list[Any] = []
        end = clock() + _FIRST_S
        while all(isinstance(event, PromptRead) for event in events) and (left := end - clock()) > 0:
            events += await self.job.take(left)
        return events

    def _bytes_of(self, events: list[Any]) -> tuple[bytes, bool]:
        found: list[bytes] = []
        for event in events:
            if event is None:
                found += self._form.end()
                return b"".join(found), True
            if (error := _error_of(event)) is not None:
                found += self._form.error(error)
                return b"".join(found), True
            if isinstance(event, PromptRead):
                self._read = event
            found += self._form.add(event)
        return b"".join(found), False

    async def _send(self, send: Send, blob: bytes) -> None:
        await send({"type": "http.response.body", "body": blob, "more_body": True})


class JsonResponse(JobResponse):
    """One JSON object. While it takes long, spaces go before it, which JSON allows; an error after that has status 200
    and is followed by a broken connection.
    """

    def __init__(self, job: ServerJob, queue: JobQueue, form: JsonForm, **options: Any) -> None:
        super().__init__(job, queue, **options)
        self._form = form

    async def _talk(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        begun, told = False, clock()
        while True:
            for event in await self.job.take(_COMMENT_S):
                if (error := _error_of(event)) is not None:
                    await self._fail_late(send, error) if begun else await self._fail(send, error)
                    return
                if event is None:
                    body = json.dumps(self._form.body(), ensure_ascii=False).encode()
                    if not begun:
                        await self._start(send, 200, "application/json")
                    await send({"type": "http.response.body", "body": body})
                    return
                self._form.add(event)
            if clock() - told >= _SPACE_S:
                if not begun:
                    await self._start(send, 200, "application/json")
                begun, told = True, clock()
                await send({"type": "http.response.body", "body": b" ", "more_body": True})

    async def _fail_late(self, send: Send, error: ApiError) -> None:
        """An error after 200 was sent: the body is left unfinished, by which a client knows."""
        body = json.dumps(self._to_error(error)).encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error_of(event: Any) -> ApiError | None:
    return as_api_error(event) if isinstance(event, BaseException) else None
