"""From a request of the messages endpoint to a chat."""

from __future__ import annotations

from typing import Any

from offmoe.chat.template import thinking_arguments
from offmoe.core.errors import UsageError
from offmoe.engine.engine import Engine
from offmoe.server.anthropic.schemas import AnthropicMessage, ContentBlock, CountRequest, MessagesRequest
from offmoe.server.chats import ChatAsk
from offmoe.server.errors import invalid, unsupported
from offmoe.server.settings import ServerSettings

_INSTEAD = {
    "container": "the server runs no code", "mcp_servers": "the server opens no address; call tools yourself",
    "context_management": "send a shorter conversation",
}  # fmt: skip
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def messages_ask(asked: CountRequest, settings: ServerSettings, engine: Engine) -> ChatAsk:
    """The same request as a chat. Raises ApiError."""
    for name, instead in _INSTEAD.items():
        if getattr(asked, name) is not None:
            raise unsupported(name, instead)
    if len(asked.messages) > settings.max_messages:
        raise invalid(f"{len(asked.messages)} messages; at most {settings.max_messages}", "messages", "invalid_value")
    messages: list[dict[str, Any]] = []
    if asked.system:
        messages.append({"role": "system", "content": _plain(asked.system, "system")})
    for number, message in enumerate(asked.messages):
        messages += _turn(message, f"messages[{number}].content")
    choice, parallel = "auto", True
    if (given := asked.tool_choice) is not None:
        if given.type == "tool" and given.name is None:
            raise invalid("Missing required parameter: 'tool_choice.name'.", "tool_choice.name")
        choice, parallel = _CHOICES.get(given.type, given.name or ""), not given.disable_parallel_tool_use
    return ChatAsk(
        messages=messages, options=_options(asked), template_kwargs=_thinking(asked, engine), choice=choice,
        is_parallel=parallel, continues=asked.messages[-1].role == "assistant",
        tools=[
            {
                "type": "function",
                "function": {
                    "name": tool.name, "description": tool.description or "", "parameters": tool.input_schema
                },
            }
            for tool in asked.tools or ()
        ],
    )  # fmt: skip


def _options(asked: CountRequest) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if asked.output_config is not None and asked.output_config.format is not None:
        options["json_schema"] = asked.output_config.format.schema_
    if isinstance(asked, MessagesRequest):
        options["max_new_tokens"] = asked.max_tokens
        for name, value in (
            ("temperature", asked.temperature), ("top_p", asked.top_p), ("top_k", asked.top_k),
            ("stop", asked.stop_sequences or None),
        ):  # fmt: skip
            if value is not None:
                options[name] = value
    return options


def _thinking(asked: CountRequest, engine: Engine) -> dict[str, Any]:
    """The template's switch. A model without one cannot be told to think; not to think it does by itself."""
    if asked.thinking is None or asked.thinking.type == "adaptive" or engine.tokenizer is None:
        return {}
    is_on = asked.thinking.type == "enabled"
    try:
        return dict(thinking_arguments(engine.tokenizer, is_on))
    except UsageError as error:
        if is_on:
            raise invalid(f"thinking: {error}", "thinking", "unsupported_parameter") from None
        return {}


def _turn(message: AnthropicMessage, path: str) -> list[dict[str, Any]]:
    """Messages of one turn: results of tools first, then what was said."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    texts: list[str] = []
    thoughts: list[str] = []
    for number, block in enumerate(message.content):
        where = f"{path}[{number}]"
        if block.type == "tool_result":
            content = _plain(block.content or "", f"{where}.content")
            results.append({"role": "tool", "tool_call_id": block.tool_use_id or "", "content": content})
        elif block.type == "tool_use":
            if block.name is None:
                raise invalid(f"Missing required parameter: '{where}.name'.", f"{where}.name")
            function = {"name": block.name, "arguments": block.input or {}}
            calls.append({"id": block.id or "", "type": "function", "function": function})
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type != "redacted_thinking":
            texts.append(_block_text(block, where))
    said: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if calls:
        said["tool_calls"] = calls
    if thoughts:
        said["reasoning_content"] = "\n".join(thoughts)
    return [*results, said] if texts or calls or not results else results


def _plain(content: str | list[ContentBlock], path: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_block_text(block, f"{path}[{number}]") for number, block in enumerate(content))


def _block_text(block: ContentBlock, path: str) -> str:
    if block.type != "text" or block.text is None:
        raise invalid(
            f"a block of type {block.type!r} is not supported here: offmoe reads text only, and opens no file and no "
            "address that a request names",
            path, "unsupported_content",
        )  # fmt: skip
    return block.text
