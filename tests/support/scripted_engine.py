"""An engine that says what a test gives it, in small pieces, with a real one's tokenizer around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import offmoe
from offmoe.core.counters import Counters

TOOL_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool['function'] | tojson }}{% endfor %}</tools> answer with "
    '<tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}'
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + (message['content'] or '') }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)


class ScriptedEngine:
    """`script` is the next reply; `asked` the last call's messages and options."""

    def __init__(self, engine: offmoe.Engine) -> None:
        self._engine = engine
        self.script = ""
        self.reason = "stop"
        self.stop_reason: str | None = None
        self.asked: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def stream_chat(self, messages: Any, **options: Any) -> Any:
        self.asked = {"messages": messages, **options}
        ids = self._engine.tokenize_chat(
            messages, chat_template_kwargs=options.get("chat_template_kwargs"),
            continue_final_message=options.get("continue_final_message", False),
        )  # fmt: skip
        if options.get("raw"):
            return _Script(self._chunks(self.script, len(ids)), ids)
        thought, closed, answer = self.script.partition("</think>")
        parts = [(thought.removeprefix("<think>"), True), (answer, False)] if closed else [(self.script, False)]
        return _Script(self._parted(parts, len(ids)), ids)

    def _parted(self, parts: list[tuple[str, bool]], num_prompt: int) -> Iterator[Any]:
        for text, reasoning in parts:
            yield from (offmoe.Chunk(piece, (1,), reasoning=reasoning) for piece in _pieces(text))
        yield self._last(num_prompt)

    def _chunks(self, text: str, num_prompt: int) -> Iterator[Any]:
        yield from (offmoe.Chunk(piece, (1,)) for piece in _pieces(text))
        yield self._last(num_prompt)

    def _last(self, num_prompt: int) -> Any:
        stats = offmoe.GenerationStats(
            prompt_tokens=num_prompt, new_tokens=7, prefill_s=0.5, step_s=(0.1,) * 6, prefill=Counters(),
            decode=Counters(),
        )  # fmt: skip
        return offmoe.Chunk("", finish_reason=self.reason, stop_reason=self.stop_reason, stats=stats)  # type: ignore[arg-type]


class _Script:
    def __init__(self, chunks: Iterator[Any], prompt_ids: list[int]) -> None:
        self._chunks, self.prompt_ids, self.is_closed = chunks, prompt_ids, False

    def __iter__(self) -> Iterator[Any]:
        for chunk in self._chunks:
            if self.is_closed:
                return
            yield chunk

    def close(self) -> None:
        self.is_closed = True


def _pieces(text: str) -> list[str]:
    return [text[begin : begin + 3] for begin in range(0, len(text), 3)]
