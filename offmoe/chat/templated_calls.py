"""Replies read by transformers' own parser, for tokenizers that bring a template of replies."""

from __future__ import annotations

import json
from typing import Any

from offmoe.chat.tool_calls import CallArguments, CallEnded, CallStarted, ReplyPart, ReplyText

_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplatedCalls:
    """A ToolParser around a ResponseParser. A call comes when it is complete."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def add(self, text: str) -> list[ReplyPart]:
        """See ToolParser."""
        return self._parts(self._parser.feed(text))

    def flush(self) -> list[ReplyPart]:
        """See ToolParser."""
        try:
            _, events = self._parser.finalize()
        except ValueError:  # a reply that was cut within a call
            return []
        return self._parts(events)

    def _parts(self, events: list[dict[str, Any]]) -> list[ReplyPart]:
        parts: list[ReplyPart] = []
        for event in events:
            field = event.get("field")
            if event["type"] == "region_chunk" and not event.get("dirty") and event.get("text"):
                if field in _REASONING:
                    parts.append(ReplyText(event["text"], reasoning=True))
                elif field == "content":
                    parts.append(ReplyText(event["text"]))
            elif event["type"] == "region_close" and field == "tool_calls":
                value = event.get("value")
                for each in value if isinstance(value, list) else [value]:
                    parts += _call(each)
        return parts


def _call(value: Any) -> list[ReplyPart]:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return []
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return [CallStarted(function["name"]), CallArguments(text), CallEnded()]
