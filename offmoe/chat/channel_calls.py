"""Replies in channels, as gpt-oss writes them, with calls of tools."""

from __future__ import annotations

from offmoe.chat.tool_calls import CallArguments, CallEnded, CallStarted, ReplyPart, ReplyText, begun_mark


class ChannelCalls:
    """Channels of gpt-oss: reasoning, answers, and calls `<|channel|>commentary to=functions.NAME <|message|>{...}`."""

    _MARKS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")

    def __init__(self) -> None:
        self._held = self._header = ""
        self._in_header = False
        self._kind = "answer"

    def add(self, text: str) -> list[ReplyPart]:
        """See ToolParser."""
        self._held += text
        parts: list[ReplyPart] = []
        while True:
            found = [(self._held.find(mark), mark) for mark in self._MARKS if mark in self._held]
            place, mark = min(found, default=(len(self._held) - begun_mark(self._held, self._MARKS), ""))
            self._take(self._held[:place], parts)
            self._held = self._held[place + len(mark) :]
            if not mark:
                return parts
            self._mark(mark, parts)

    def flush(self) -> list[ReplyPart]:
        """See ToolParser."""
        parts: list[ReplyPart] = []
        self._take(self._held, parts)
        self._end(parts)
        self._held = ""
        return parts

    def _take(self, text: str, parts: list[ReplyPart]) -> None:
        if not text:
            return
        if self._in_header:
            self._header += text
        elif self._kind == "call":
            parts.append(CallArguments(text))
        else:
            parts.append(ReplyText(text, self._kind == "reasoning"))

    def _mark(self, mark: str, parts: list[ReplyPart]) -> None:
        if mark == "<|message|>":
            self._in_header = False
            self._begin(parts)
        elif mark in {"<|start|>", "<|channel|>", "<|constrain|>"}:
            self._end(parts)
            if mark == "<|start|>" or not self._in_header:
                self._header = ""
            self._in_header = True
            self._header += f" {mark} "
        else:
            self._end(parts)

    def _begin(self, parts: list[ReplyPart]) -> None:
        words = self._header.split()
        to = next((word.removeprefix("to=") for word in words if word.startswith("to=")), None)
        if to is not None:
            self._kind = "call"
            parts.append(CallStarted(to.removeprefix("functions.")))
        else:
            self._kind = "answer" if "final" in words or "<|channel|>" not in words else "reasoning"
        self._header = ""

    def _end(self, parts: list[ReplyPart]) -> None:
        if self._kind == "call" and not self._in_header:
            parts.append(CallEnded())
            self._kind = "answer"
