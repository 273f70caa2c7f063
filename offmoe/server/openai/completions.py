"""Replies of `POST /v1/completions`, as a whole and as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from offmoe.server.errors import ApiError
from offmoe.server.events import Event, PromptRead, ReplyEnd, TextDelta
from offmoe.server.openai.logprobs import CompletionLogprobs, TokenNames
from offmoe.server.responses import sse
from offmoe.server.usage import openai_usage, timings

_FINISHED = b"data: [DONE]\n\n"


@dataclass(kw_only=True)
class CompletionHead:
    """Fields that every object of one reply has, and settings of its form.

    `echoed`: for each choice the prompt's text, where it is to be part of the reply; `prompts`: its ids.
    """

    model: str
    prompts: Sequence[Sequence[int]]
    echoed: Sequence[str] | None
    num_prompt: int
    num_choices: int
    names: TokenNames
    num_logprobs: int | None = None
    include_usage: bool = False
    reply_id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self) -> dict[str, Any]:
        """The head of an object."""
        return {
            "id": self.reply_id, "object": "text_completion", "created": self.created, "model": self.model,
            "system_fingerprint": "offmoe",
        }  # fmt: skip


class _Choices:
    """Text and log probabilities of each choice, with the prompt before them where it is echoed."""

    def __init__(self, head: CompletionHead) -> None:
        self.head = head
        self._begun: set[int] = set()
        self._lists = [
            None if head.num_logprobs is None else CompletionLogprobs(head.names, head.num_logprobs)
            for _ in range(head.num_choices)
        ]

    def piece(self, event: TextDelta | ReplyEnd) -> tuple[str, dict[str, Any] | None]:
        """Text that the event adds, and its lists."""
        index, text, lists = event.index, "", self._lists[event.index]
        delta = event if isinstance(event, TextDelta) else None
        ids = list(delta.token_ids) if delta is not None else []
        found = list(delta.logprobs or ()) if delta is not None else []
        if index not in self._begun:
            self._begun.add(index)
            if self.head.echoed is not None:
                text = self.head.echoed[index]
                if lists is not None:
                    prompt = self.head.prompts[index]
                    ids = [*prompt, *ids]
                    of_prompt = delta.prompt_logprobs if delta is not None else None
                    found = [*(of_prompt or [None] * len(prompt)), *found]
        text += delta.text if delta is not None else ""
        return text, lists.of(ids, found) if lists is not None and (ids or isinstance(event, TextDelta)) else None


class CompletionStreamForm:
    """Chunks of completions."""

    def __init__(self, head: CompletionHead) -> None:
        self._head, self._choices = head, _Choices(head)
        self._ends: list[ReplyEnd] = []

    def add(self, event: Event) -> Iterator[bytes]:
        """See SseForm."""
        if isinstance(event, PromptRead):
            return
        assert isinstance(event, (TextDelta, ReplyEnd)), f"{event=}"
        text, logprobs = self._choices.piece(event)
        if isinstance(event, ReplyEnd):
            self._ends.append(event)
            more = {"timings": found} if (found := timings(event)) is not None else {}
            yield self._chunk(event.index, text, logprobs, event.reason, **more)
        elif text or logprobs is not None:
            yield self._chunk(event.index, text, logprobs, None)

    def end(self) -> Iterator[bytes]:
        """See SseForm."""
        if self._head.include_usage:
            usage = openai_usage(self._head.num_prompt, self._ends)
            yield sse({**self._head.object(), "choices": [], "usage": usage})
        yield _FINISHED

    def error(self, error: ApiError) -> Iterator[bytes]:
        """See SseForm."""
        yield sse(error.body())
        yield _FINISHED

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None, **more: Any) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._head.include_usage else {}
        return sse({**self._head.object(), "choices": [choice], **usage, **more})


class CompletionJsonForm:
    """Completions as one object."""

    def __init__(self, head: CompletionHead) -> None:
        self._head, self._choices = head, _Choices(head)
        self._texts: list[list[str]] = [[] for _ in range(head.num_choices)]
        self._logprobs: list[dict[str, Any] | None] = [None] * head.num_choices
        self._ends: dict[int, ReplyEnd] = {}

    def add(self, event: Event) -> None:
        """See JsonForm."""
        if isinstance(event, PromptRead):
            return
        assert isinstance(event, (TextDelta, ReplyEnd)), f"{event=}"
        text, lists = self._choices.piece(event)
        self._texts[event.index].append(text)
        if lists is not None:
            self._logprobs[event.index] = _joined(self._logprobs[event.index], lists)
        if isinstance(event, ReplyEnd):
            self._ends[event.index] = event

    def body(self) -> dict[str, Any]:
        """See JsonForm."""
        ends = [self._ends[index] for index in sorted(self._ends)]
        found = timings(ends[0]) if ends else None
        return {
            **self._head.object(),
            "choices": [
                {
                    "index": index, "text": "".join(texts), "logprobs": self._logprobs[index],
                    "finish_reason": self._ends[index].reason if index in self._ends else "length",
                }
                for index, texts in enumerate(self._texts)
            ],
            "usage": openai_usage(self._head.num_prompt, ends),
            **({} if found is None else {"timings": found}),
        }  # fmt: skip


def _joined(before: dict[str, Any] | None, lists: dict[str, Any]) -> dict[str, Any]:
    if before is None:
        return lists
    return {name: values if values is None else before[name] + values for name, values in lists.items()}
