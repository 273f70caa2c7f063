"""Replies of `POST /v1/messages`: blocks of thinking, text and calls, as a whole and as a stream of their changes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from offmoe.server.errors import ApiError, error_body
from offmoe.server.events import Event, PromptRead, ReplyEnd, TextDelta, ToolCallArguments, ToolCallBegin
from offmoe.server.responses import sse
from offmoe.server.usage import cached_tokens, timings

_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


class MessageHead:
    """Fields that the message has from its begin."""

    def __init__(self, model: str, num_prompt: int) -> None:
        self._model, self._num_prompt = model, num_prompt
        self._message_id = f"msg_{uuid.uuid4().hex}"

    def object(self, content: list[dict[str, Any]], end: ReplyEnd | None) -> dict[str, Any]:
        """The message in this state."""
        reason, stop = stop_fields(end)
        return {
            "id": self._message_id, "type": "message", "role": "assistant", "model": self._model, "content": content,
            "stop_reason": reason, "stop_sequence": stop, "usage": self.usage(end),
        }  # fmt: skip

    def usage(self, end: ReplyEnd | None) -> dict[str, Any]:
        """Counts: what was kept of the prompt is not among the input."""
        cached = cached_tokens([end]) if end is not None else 0
        return {
            "input_tokens": self._num_prompt - cached, "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0, "output_tokens": 0 if end is None else end.num_tokens,
        }  # fmt: skip


def stop_fields(end: ReplyEnd | None) -> tuple[str | None, str | None]:
    """`stop_reason` and `stop_sequence`."""
    if end is None:
        return None, None
    if end.reason == "stop" and isinstance(end.stop_reason, str):
        return "stop_sequence", end.stop_reason
    return _REASONS[end.reason], None


class MessageStreamForm:
    """Events of a message."""

    def __init__(self, head: MessageHead) -> None:
        self._head = head
        self._kind: str | None = None
        self._number = -1
        self._is_begun = False
        self._end: ReplyEnd | None = None

    def add(self, event: Event) -> Iterator[bytes]:
        """See SseForm."""
        if not self._is_begun:
            self._is_begun = True
            yield _event("message_start", message=self._head.object([], None))
            yield _event("ping")
        if isinstance(event, TextDelta) and event.text:
            kind = "thinking" if event.reasoning else "text"
            if self._kind != kind:
                yield from self._open(kind, {"thinking": "", "signature": ""} if event.reasoning else {"text": ""})
            yield self._delta(f"{kind}_delta", **{kind: event.text})
        elif isinstance(event, ToolCallBegin):
            yield from self._open("tool_use", {"id": event.call_id, "name": event.name, "input": {}})
        elif isinstance(event, ToolCallArguments):
            yield self._delta("input_json_delta", partial_json=event.text)
        elif isinstance(event, ReplyEnd):
            self._end = event
        elif isinstance(event, PromptRead):
            return

    def end(self) -> Iterator[bytes]:
        """See SseForm."""
        if self._number < 0:
            yield from self._open("text", {"text": ""})
        yield from self._close()
        reason, stop = stop_fields(self._end)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        found = timings(self._end) if self._end is not None else None
        more = {} if found is None else {"timings": found}
        yield _event("message_delta", delta=delta, usage=self._head.usage(self._end), **more)
        yield _event("message_stop")

    def error(self, error: ApiError) -> Iterator[bytes]:
        """See SseForm."""
        yield sse(error_body(error, "/v1/messages"), "error")

    def _open(self, kind: str, fields: dict[str, Any]) -> Iterator[bytes]:
        yield from self._close()
        self._kind, self._number = kind, self._number + 1
        yield _event("content_block_start", index=self._number, content_block={"type": kind, **fields})

    def _close(self) -> Iterator[bytes]:
        if self._kind == "thinking":  # clients keep it with the block; what it signs is not checked here
            yield self._delta("signature_delta", signature="offmoe")
        if self._kind is not None:
            yield _event("content_block_stop", index=self._number)
        self._kind = None

    def _delta(self, kind: str, **fields: Any) -> bytes:
        return _event("content_block_delta", index=self._number, delta={"type": kind, **fields})


class MessageJsonForm:
    """A message as one object."""

    def __init__(self, head: MessageHead) -> None:
        self._head = head
        self._content: list[dict[str, Any]] = []
        self._end: ReplyEnd | None = None

    def add(self, event: Event) -> None:
        """See JsonForm."""
        if isinstance(event, TextDelta) and event.text:
            kind = "thinking" if event.reasoning else "text"
            if not self._content or self._content[-1]["type"] != kind:
                signed = {"signature": "offmoe"} if event.reasoning else {}
                self._content.append({"type": kind, kind: "", **signed})
            self._content[-1][kind] += event.text
        elif isinstance(event, ToolCallBegin):
            self._content.append({"type": "tool_use", "id": event.call_id, "name": event.name, "input": ""})
        elif isinstance(event, ToolCallArguments):
            self._content[-1]["input"] += event.text
        elif isinstance(event, ReplyEnd):
            self._end = event

    def body(self) -> dict[str, Any]:
        """See JsonForm."""
        content = [
            {**block, "input": _object(block["input"])} if block["type"] == "tool_use" else block
            for block in self._content
        ]
        found = timings(self._end) if self._end is not None else None
        more = {} if found is None else {"timings": found}
        return {**self._head.object(content or [{"type": "text", "text": ""}], self._end), **more}


def _object(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):  # a call that was cut
        return {"_incomplete": text}


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)
