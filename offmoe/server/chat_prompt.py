"""Messages as clients send them, turned into those that a chat template reads."""

from __future__ import annotations

import json
from typing import Any

from offmoe.chat.template import template_text, thinking_arguments
from offmoe.core.errors import UsageError
from offmoe.server.errors import invalid
from offmoe.server.openai.schemas import ChatMessage, ChatRequest
from offmoe.server.settings import ServerSettings

_NO_REASONING = ("none", "minimal")


def engine_messages(request: ChatRequest, settings: ServerSettings) -> list[dict[str, Any]]:
    """Messages for `Engine.tokenize_chat`. Raises ApiError with the path of the field."""
    if len(request.messages) > settings.max_messages:
        raise invalid(f"{len(request.messages)} messages; at most {settings.max_messages}", "messages", "invalid_value")
    return [_message(message, f"messages[{idx}]") for idx, message in enumerate(request.messages)]


def _message(message: ChatMessage, path: str) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": _content(message, path)}
    if message.name is not None:
        found["name"] = message.name
    if (reasoning := message.reasoning_content or message.reasoning) and message.role == "assistant":
        found["reasoning_content"] = reasoning
    if message.tool_calls:
        if message.role != "assistant":
            raise invalid("tool calls are the assistant's", f"{path}.tool_calls")
        found["tool_calls"] = [
            {
                "id": call.id or f"call_{number}", "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for number, call in enumerate(message.tool_calls)
        ]  # fmt: skip
    if message.role == "tool" and message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found


def _content(message: ChatMessage, path: str) -> str | None:
    if message.content is None:
        if message.tool_calls:
            return ""
        raise invalid("a message needs content", f"{path}.content", "missing_required_parameter")
    if isinstance(message.content, str):
        return message.content
    texts = []
    for number, part in enumerate(message.content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in {"text", "input_text", "output_text", "refusal"} or text is None:
            raise invalid(
                f"a part of type {part.type!r} is not supported: offmoe reads text only, and opens no file and no "
                "address that a request names",
                f"{path}.content[{number}]", "unsupported_content",
            )  # fmt: skip
        texts.append(text)
    return "\n".join(texts)


def _arguments(given: str | dict[str, Any]) -> Any:
    """An object, as templates read it; text that is no object stays text."""
    if not isinstance(given, str):
        return given
    try:
        value = json.loads(given or "{}")
    except (ValueError, RecursionError):
        return given
    return value if isinstance(value, dict) else given


def template_kwargs(request: ChatRequest, tokenizer: Any) -> dict[str, Any]:
    """Variables of the template: the request's own, and its effort of reasoning. Raises ApiError."""
    found = own_kwargs(request.chat_template_kwargs)
    if request.reasoning_effort is not None:
        found |= effort_kwargs(request.reasoning_effort, tokenizer, "reasoning_effort")
    return found


def own_kwargs(given: dict[str, Any] | None) -> dict[str, Any]:
    """Variables that a request names. Raises ApiError for those that have fields of their own."""
    for name in ("tools", "chat_template", "documents"):
        if name in (given or {}):
            raise invalid(f"{name} is no variable for chat_template_kwargs", f"chat_template_kwargs.{name}")
    return dict(given or {})


def effort_kwargs(effort: str, tokenizer: Any, param: str) -> dict[str, Any]:
    """The template's own variable of that name, else its switch. Raises ApiError where it has neither."""
    if "reasoning_effort" in template_text(tokenizer):
        return {"reasoning_effort": effort}
    try:
        return dict(thinking_arguments(tokenizer, effort not in _NO_REASONING))
    except UsageError as error:
        raise invalid(f"{param}: {error}", param, "unsupported_parameter") from None
