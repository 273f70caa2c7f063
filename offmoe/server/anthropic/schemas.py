"""Requests of Anthropic's messages endpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from offmoe.server.body import Fields, ModelRequest


class ContentBlock(Fields):
    """A block of a message. Images and documents are refused where messages are read."""

    type: str
    text: str | None = None
    citations: Any = None
    cache_control: Any = None
    # tool_use
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    caller: Any = None
    # tool_result
    tool_use_id: str | None = None
    content: str | list[ContentBlock] | None = None
    is_error: bool | None = None
    # thinking
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    # refused
    source: Any = None
    title: Any = None
    context: Any = None


class AnthropicMessage(Fields):
    """A turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class AnthropicTool(Fields):
    """A tool with its schema; tools that run at Anthropic's are refused by their type."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: Any = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None


class AnthropicChoice(Fields):
    """Which tools may, must or must not be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingSettings(Fields):
    """Whether the model thinks first. `budget_tokens` is taken and bounds nothing: `max_tokens` does."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: str | None = None


class OutputFormat(Fields):
    """Form of the answer: JSON of a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    """Form and effort of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(ModelRequest):
    """`POST /v1/messages/count_tokens`."""

    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | list[ContentBlock] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: ThinkingSettings | None = None
    output_config: OutputConfig | None = None
    # Refused by name.
    container: Any = None
    mcp_servers: Any = None
    context_management: Any = None


class MessagesRequest(CountRequest):
    """`POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
