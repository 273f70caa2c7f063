"""Calls of tools read out of a reply as it comes: text, begins of calls, and pieces of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from offmoe.chat.tool_formats import ToolFormat, ToolSchemas


@dataclass(frozen=True, slots=True)
class ReplyText:
    """Text of a reply outside of calls; `reasoning`: before the answer."""

    text: str
    reasoning: bool = False


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call begins."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the arguments' JSON text, of the call that began last."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The call that began last is complete."""


ReplyPart = ReplyText | CallStarted | CallArguments | CallEnded


class ToolParser(Protocol):
    """`add` returns what is certain by now, `flush` the rest."""

    def add(self, text: str) -> list[ReplyPart]:
        """Parts that `text` completes."""

    def flush(self) -> list[ReplyPart]:
        """Parts that were held back."""


def schemas_of(tools: Sequence[dict[str, Any]]) -> ToolSchemas:
    """Schemas of the tools' parameters, by the tools' names. `tools` as chat templates take them."""
    found = {}
    for tool in tools:
        function = tool.get("function", tool)
        parameters = function.get("parameters") or {}
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        found[function["name"]] = properties if isinstance(properties, dict) else {}
    return found


class MarkedCalls:
    """Calls between marks. What looks like a call and is none is text."""

    def __init__(self, form: ToolFormat, schemas: ToolSchemas) -> None:
        self._form, self._schemas = form, schemas
        self._held = ""
        self._call: _OpenCall | None = None

    def add(self, text: str) -> list[ReplyPart]:
        """See ToolParser."""
        self._held += text
        parts: list[ReplyPart] = []
        while self._step(parts):
            pass
        return parts

    def flush(self) -> list[ReplyPart]:
        """See ToolParser."""
        parts: list[ReplyPart] = []
        if self._call is not None:
            parts += self._call.add(self._held)
            parts += self._call.close(self._form, self._schemas)
        elif self._held:
            parts.append(ReplyText(self._held))
        self._held, self._call = "", None
        return parts

    def _step(self, parts: list[ReplyPart]) -> bool:
        """Take what is certain; False where more text is needed."""
        if self._call is not None:
            return self._inside(parts)
        marks = (self._form.opens, *self._form.ignored)
        place, mark = min(((self._held.find(mark), mark) for mark in marks if mark in self._held), default=(-1, ""))
        if place < 0:
            # Blank lines before a call belong to it.
            keep = max(begun_mark(self._held.rstrip(), marks), 0)
            text = self._held.rstrip()
            text = text[: len(text) - keep].rstrip()
            if text:
                parts.append(ReplyText(text))
            self._held = self._held[len(text) :]
            return False
        if before := self._held[:place].rstrip():
            parts.append(ReplyText(before))
        self._held = self._held[place + len(mark) :]
        if mark == self._form.opens:
            self._call = _OpenCall(self._form)
        return True

    def _inside(self, parts: list[ReplyPart]) -> bool:
        assert self._call is not None
        end = self._form.closes or self._form.opens
        before, found, after = self._held.partition(end)
        if not found:
            keep = begun_mark(before, (end,))
            parts += self._call.add(before[: len(before) - keep])
            self._held = before[len(before) - keep :]
            return False
        parts += self._call.add(before)
        parts += self._call.close(self._form, self._schemas)
        self._call = None
        self._held = after if self._form.closes else found + after
        return True


class _OpenCall:
    """A call that is being written."""

    def __init__(self, form: ToolFormat) -> None:
        self._head = form.head
        self._body = ""
        self._scan: JsonScan | None = None

    def add(self, text: str) -> list[ReplyPart]:
        """Parts that are certain: the name once it is there, arguments as they come."""
        self._body += text
        parts: list[ReplyPart] = []
        if self._scan is None:
            match = self._head.match(self._body) if self._head is not None else None
            if match is None:
                return []
            parts.append(CallStarted(match[1].strip()))
            self._scan, text = JsonScan(), self._body[match.end() :]
        if piece := self._scan.take(text):
            parts.append(CallArguments(piece))
        return parts

    def close(self, form: ToolFormat, schemas: ToolSchemas) -> list[ReplyPart]:
        """The rest of it."""
        if self._scan is not None:
            return [CallEnded()]
        try:
            found = form.parse(self._body.strip(), schemas)
        except (ValueError, RecursionError):
            return [ReplyText(form.opens + self._body + form.closes)]
        return [part for name, text in found for part in (CallStarted(name), CallArguments(text), CallEnded())]


class JsonScan:
    """Cuts one JSON object off the begin of a text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = self._is_escaped = self.is_done = False

    def take(self, text: str) -> str:
        """The part of `text` that belongs to the object."""
        if self.is_done:
            return ""
        for place, letter in enumerate(text):
            if self._in_text:
                if self._is_escaped:
                    self._is_escaped = False
                elif letter == "\\":
                    self._is_escaped = True
                elif letter == '"':
                    self._in_text = False
            elif letter == '"':
                self._in_text = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.is_done = True
                    return text[: place + 1]
        return text


def begun_mark(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `marks`, and is not all of it."""
    most = max((len(mark) for mark in marks), default=1) - 1
    return next(
        (
            n
            for n in range(min(most, len(text)), 0, -1)
            if any(len(mark) > n and mark.startswith(text[-n:]) for mark in marks)
        ),
        0,
    )
