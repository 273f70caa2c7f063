"""Replies of `POST /v1/responses`: items of reasoning, text and calls, as a whole and as a stream of their changes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from offmoe.server.errors import ApiError
from offmoe.server.events import Event, PromptRead, ReplyEnd, TextDelta, ToolCallArguments, ToolCallBegin
from offmoe.server.openai.responses_schemas import ChosenFunction, ResponsesRequest
from offmoe.server.responses import sse
from offmoe.server.usage import openai_usage, timings

_NAMES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_PARTS = {"reasoning": "reasoning_text", "message": "output_text"}


class ResponseHead:
    """Fields of the response object that its request decides."""

    def __init__(self, asked: ResponsesRequest, model: str, num_prompt: int) -> None:
        self.num_prompt = num_prompt
        self._fields: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), "model": model,
            "background": False, "error": None, "instructions": asked.instructions, "metadata": asked.metadata or {},
            "max_output_tokens": asked.max_output_tokens, "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None, "store": False, "temperature": asked.temperature, "top_p": asked.top_p,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "text": (asked.text.model_dump(by_alias=True, exclude_none=True) if asked.text else {})
            or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice.model_dump() if isinstance(asked.tool_choice, ChosenFunction)
            else asked.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in asked.tools or ()], "truncation": "disabled", "user": asked.user,
        }  # fmt: skip

    def object(self, status: str, output: list[dict[str, Any]], end: ReplyEnd | None, **more: Any) -> dict[str, Any]:
        """The response in this state."""
        usage = None
        if end is not None:
            counts = openai_usage(self.num_prompt, [end])
            usage = {
                "input_tokens": counts["prompt_tokens"], "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": counts["completion_tokens_details"], "total_tokens": counts["total_tokens"],
            }  # fmt: skip
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        found = timings(end) if end is not None else None
        timed = {} if found is None else {"timings": found}
        fields = {**self._fields, "status": status, "output": output, "usage": usage, "incomplete_details": cut}
        return {**fields, **timed, **more}


class _Items:
    """Items of the output, the last one open."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []
        self.open: dict[str, Any] | None = None
        self.end: ReplyEnd | None = None

    def begin(self, kind: str, **fields: Any) -> dict[str, Any]:
        item: dict[str, Any] = {"id": f"{_NAMES[kind]}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        self.all.append({**item, **fields})
        self.open = self.all[-1]
        return self.open

    def status(self) -> str:
        return "completed" if self.end is not None and self.end.reason != "length" else "incomplete"


class ResponsesStreamForm:
    """Events of a response, numbered."""

    def __init__(self, head: ResponseHead) -> None:
        self._head, self._items = head, _Items()
        self._number = 0
        self._begun = False

    def add(self, event: Event) -> Iterator[bytes]:
        """See SseForm."""
        if not self._begun:
            self._begun = True
            response = self._head.object("in_progress", [], None)
            yield self._event("response.created", response=response)
            yield self._event("response.in_progress", response=response)
        if isinstance(event, TextDelta):
            if event.text:
                yield from self._text(event)
        elif isinstance(event, ToolCallBegin):
            yield from self._close()
            item = self._items.begin("function_call", call_id=event.call_id, name=event.name, arguments="")
            yield self._event("response.output_item.added", output_index=self._place, item=dict(item))
        elif isinstance(event, ToolCallArguments):
            assert self._items.open is not None
            self._items.open["arguments"] += event.text
            yield self._event("response.function_call_arguments.delta", **self._where(), delta=event.text)
        elif isinstance(event, ReplyEnd):
            self._items.end = event

    def end(self) -> Iterator[bytes]:
        """See SseForm."""
        yield from self._close()
        status = self._items.status()
        yield self._event(f"response.{status}", response=self._head.object(status, self._items.all, self._items.end))

    def error(self, error: ApiError) -> Iterator[bytes]:
        """See SseForm."""
        told = {"code": error.code or error.kind, "message": error.message}
        response = self._head.object("failed", self._items.all, None, error=told)
        yield self._event("response.failed", response=response)

    def _text(self, event: TextDelta) -> Iterator[bytes]:
        kind = "reasoning" if event.reasoning else "message"
        if self._items.open is None or self._items.open["type"] != kind:
            yield from self._close()
            item = self._items.begin(kind)
            yield self._event("response.output_item.added", output_index=self._place, item={**item, "content": []})
            part = _part(kind, "")
            item["content"].append(part)
            yield self._event("response.content_part.added", **self._where(), content_index=0, part=dict(part))
        assert self._items.open is not None
        self._items.open["content"][0]["text"] += event.text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"response.{_PARTS[kind]}.delta", **self._where(), content_index=0, delta=event.text, **more)

    def _close(self) -> Iterator[bytes]:
        """Events of the open item's end."""
        item = self._items.open
        if item is None:
            return
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._event("response.function_call_arguments.done", **self._where(), **done)
        else:
            part = item["content"][0]
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            where = {**self._where(), "content_index": 0}
            yield self._event(f"response.{_PARTS[item['type']]}.done", **where, text=part["text"], **more)
            yield self._event("response.content_part.done", **where, part=part)
        item["status"] = "completed"
        yield self._event("response.output_item.done", output_index=self._place, item=item)
        self._items.open = None

    @property
    def _place(self) -> int:
        return len(self._items.all) - 1

    def _where(self) -> dict[str, Any]:
        assert self._items.open is not None
        return {"item_id": self._items.open["id"], "output_index": self._place}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number - 1, **fields}, kind)


class ResponsesJsonForm:
    """A response as one object."""

    def __init__(self, head: ResponseHead) -> None:
        self._head, self._items = head, _Items()

    def add(self, event: Event) -> None:
        """See JsonForm."""
        items = self._items
        if isinstance(event, TextDelta) and event.text:
            kind = "reasoning" if event.reasoning else "message"
            if items.open is None or items.open["type"] != kind:
                items.begin(kind)["content"].append(_part(kind, ""))
            assert items.open is not None
            items.open["content"][0]["text"] += event.text
        elif isinstance(event, ToolCallBegin):
            items.begin("function_call", call_id=event.call_id, name=event.name, arguments="")
        elif isinstance(event, ToolCallArguments):
            assert items.open is not None
            items.open["arguments"] += event.text
        elif isinstance(event, ReplyEnd):
            items.end = event
        elif isinstance(event, PromptRead):
            return

    def body(self) -> dict[str, Any]:
        """See JsonForm."""
        for item in self._items.all:
            item["status"] = "completed"
        return self._head.object(self._items.status(), self._items.all, self._items.end)


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
