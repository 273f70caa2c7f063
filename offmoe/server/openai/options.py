"""From a request's fields to the engine's options."""

from __future__ import annotations

from typing import Any

from offmoe.server.errors import invalid, unsupported
from offmoe.server.openai.schemas import ChatRequest, CompletionRequest, ResponseFormat, Sampling
from offmoe.server.settings import ServerSettings

# Fields whose names and meaning are the engine's.
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "grammar", "regex",
)  # fmt: skip
_INSTEAD = {
    "functions": "use tools", "function_call": "use tool_choice", "audio": "this model writes text",
    "prediction": "leave it out", "web_search_options": "the server opens nothing on the web",
    "best_of": "use n", "suffix": "the model has no form for text to be filled in; leave it out",
}  # fmt: skip


def refuse_unsupported(request: Sampling) -> None:
    """Raise ApiError for a field of the API that is not served, by its name."""
    for name, instead in _INSTEAD.items():
        if getattr(request, name, None) is not None:
            raise unsupported(name, instead)


def request_options(request: Sampling, settings: ServerSettings) -> dict[str, Any]:
    """Options of the engine that the request sets, checked. Raises ApiError and UsageError."""
    refuse_unsupported(request)
    options = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    if request.n is not None and request.n > settings.max_n:
        raise invalid(f"n is {request.n}; at most {settings.max_n} replies", "n", "invalid_value")
    for name in ("grammar", "regex"):
        if len(options.get(name, "")) > settings.max_schema_bytes:
            raise invalid(f"{name} has more than {settings.max_schema_bytes} characters", name, "invalid_value")
    if request.cache_prompt is False:
        options["reuse"] = False
    return options


def chat_options(request: ChatRequest, settings: ServerSettings, room: int) -> dict[str, Any]:
    """Options of a chat; `room`: tokens that the context has, the reply's length where the request sets none."""
    options = request_options(request, settings)
    if request.max_tokens and request.max_completion_tokens:
        raise invalid("give max_tokens or max_completion_tokens, one of the two", "max_tokens")
    options["max_new_tokens"] = request.max_completion_tokens or request.max_tokens or room
    if request.logprobs:
        options["logprobs"] = request.top_logprobs or 0
    elif request.top_logprobs is not None:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    options |= _format_options(request.response_format, options)
    return options


def _format_options(form: ResponseFormat | None, given: dict[str, Any]) -> dict[str, Any]:
    if form is None or form.type == "text":
        return {}
    for name in ("grammar", "regex"):
        if name in given:
            raise invalid(f"response_format and {name} are two rules for one reply; give one", name)
    if form.type == "json_object":
        return {"json_schema": True if form.schema_ is None else form.schema_}
    if form.json_schema is None:
        raise invalid("response_format.json_schema is missing", "response_format.json_schema")
    schema = form.json_schema.schema_
    return {"json_schema": True if schema is None else schema}


def completion_options(request: CompletionRequest, settings: ServerSettings) -> dict[str, Any]:
    """Options of a completion; without max_tokens 16 tokens, as OpenAI's."""
    options = request_options(request, settings)
    options["max_new_tokens"] = 16 if request.max_tokens is None else request.max_tokens
    wanted = 1 if request.logprobs is True else None if request.logprobs is False else request.logprobs
    if wanted is not None:
        options["logprobs"] = wanted
        if request.echo:
            options["prompt_logprobs"] = wanted
    elif request.max_tokens == 0:
        options["prompt_logprobs"] = 0  # the prompt is read, and nothing is said of it
    if request.json_schema is not None:
        options["json_schema"] = request.json_schema
    return options
