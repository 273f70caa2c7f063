"""From a request of the responses endpoint to a chat."""

from __future__ import annotations

import json
from typing import Any

from offmoe.engine.engine import Engine
from offmoe.server.chat_prompt import effort_kwargs, own_kwargs
from offmoe.server.chats import ChatAsk
from offmoe.server.errors import invalid, unsupported
from offmoe.server.openai.responses_schemas import InputItem, InputPart, ResponsesRequest
from offmoe.server.settings import ServerSettings

_INSTEAD = {
    "previous_response_id": "the server keeps no responses; send the whole input", "prompt": "send input",
    "conversation": "the server keeps no conversations; send the whole input", "max_tool_calls": "leave it out",
    "context_management": "send a shorter input", "top_logprobs": "use /v1/chat/completions",
}  # fmt: skip
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "stop",
)  # fmt: skip


def responses_ask(asked: ResponsesRequest, settings: ServerSettings, engine: Engine) -> ChatAsk:
    """The same request as a chat. Raises ApiError."""
    for name, instead in _INSTEAD.items():
        if getattr(asked, name) is not None:
            raise unsupported(name, instead)
    options = {name: value for name in _SAME if (value := getattr(asked, name)) is not None}
    options["max_new_tokens"] = asked.max_output_tokens or engine.context_length
    form = asked.text.format if asked.text is not None else None
    if form is not None and form.type != "text":
        options["json_schema"] = True if form.schema_ is None else form.schema_
    kwargs = own_kwargs(asked.chat_template_kwargs)
    if asked.reasoning is not None and asked.reasoning.effort is not None:
        kwargs |= effort_kwargs(asked.reasoning.effort, engine.tokenizer, "reasoning.effort")
    choice = asked.tool_choice or "auto"
    return ChatAsk(
        messages=_messages(asked, settings), options=options, template_kwargs=kwargs,
        tools=[
            {
                "type": "function",
                "function": tool.model_dump(exclude_none=True, include={"name", "description", "parameters"}),
            }
            for tool in asked.tools or ()
        ],
        choice=choice if isinstance(choice, str) else choice.name,
        is_parallel=asked.parallel_tool_calls is not False,
    )  # fmt: skip


def _messages(asked: ResponsesRequest, settings: ServerSettings) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if asked.instructions:
        messages.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        return [*messages, {"role": "user", "content": asked.input}]
    if len(asked.input) > settings.max_messages:
        raise invalid(f"{len(asked.input)} items; at most {settings.max_messages}", "input", "invalid_value")
    reasoning = ""
    for number, item in enumerate(asked.input):
        path = f"input[{number}]"
        if item.type == "reasoning":
            reasoning += _text(item.content or [], f"{path}.content")
        elif item.type == "function_call_output":
            content = _text(item.output or "", f"{path}.output")
            messages.append({"role": "tool", "tool_call_id": item.call_id or "", "content": content})
        else:
            message = _called(item, path) if item.type == "function_call" else _said(item, path)
            if message["role"] == "assistant" and reasoning:
                message["reasoning_content"], reasoning = reasoning, ""
            last = messages[-1] if messages else None
            if item.type == "function_call" and last is not None and last["role"] == "assistant":
                last.setdefault("tool_calls", []).extend(message["tool_calls"])
            else:
                messages.append(message)
    return messages


def _said(item: InputItem, path: str) -> dict[str, Any]:
    if item.role is None or item.content is None:
        missing = "role" if item.role is None else "content"
        raise invalid(f"Missing required parameter: '{path}.{missing}'.", f"{path}.{missing}")
    return {"role": item.role, "content": _text(item.content, f"{path}.content")}


def _called(item: InputItem, path: str) -> dict[str, Any]:
    if item.name is None:
        raise invalid(f"Missing required parameter: '{path}.name'.", f"{path}.name")
    try:
        arguments = json.loads(item.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = item.arguments
    call = {"id": item.call_id or "", "type": "function", "function": {"name": item.name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _text(content: str | list[InputPart], path: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in {"input_text", "output_text", "text", "reasoning_text", "refusal"} or text is None:
            raise invalid(
                f"a part of type {part.type!r} is not supported: offmoe reads text only", f"{path}[{number}]",
                "unsupported_content",
            )  # fmt: skip
        texts.append(text)
    return "\n".join(texts)
