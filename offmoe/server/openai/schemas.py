"""Requests of OpenAI's chat and completions endpoints, with the fields that llama-server and vLLM add."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from offmoe.server.body import Fields, ModelRequest

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class StreamOptions(Fields):
    """`include_usage`: a last chunk with the usage."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Fields):
    """A schema with its name, as structured outputs have it."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """Form of the answer: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class FunctionSpec(Fields):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Fields):
    """A tool: functions are the only kind."""

    type: Literal["function"]
    function: FunctionSpec


class FunctionName(Fields):
    """The name of a function."""

    name: str


class NamedTool(Fields):
    """A choice of one tool."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Fields):
    """A call that the model made; arguments are JSON text, or already an object."""

    name: str
    arguments: str | dict[str, Any] = ""


class CalledTool(Fields):
    """A call with the id that its result names."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction


class TextPart(Fields):
    """A part of a message; other kinds than text are refused."""

    type: str
    text: str | None = None
    refusal: str | None = None
    cache_control: Any = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None


class ChatMessage(Fields):
    """A message. Fields that replies of servers have, and that change no prompt, are taken and not used."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    provider_specific_fields: Any = None
    reasoning_details: Any = None
    thinking_blocks: Any = None
    cache_control: Any = None


class Sampling(ModelRequest):
    """Fields that chat and completions share."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    grammar: Text | None = None
    regex: Text | None = None
    return_progress: bool | None = None
    cache_prompt: bool | None = None
    # Names for who asks and for bills: taken, of no effect on the reply.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    # Refused by name, in `refused`.
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | bool | None = None
    echo: bool | None = None
    json_schema: dict[str, Any] | None = None
    best_of: Any = None
    suffix: Any = None
