"""OpenAI's and Anthropic's own Python clients against the running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from http_servers import HI, MODEL, serving
from patience import PATIENCE_S
from pydantic import BaseModel
from scripted_engine import TOOL_TEMPLATE

import offmoe
from offmoe.server.serve import RunningServer

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
}
KEY = "key-of-the-clients"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    from offmoe.server.settings import make_server_settings

    def load(progress: Any) -> Any:
        engine = offmoe.load(ram="1GiB", progress=progress)
        engine.tokenizer.chat_template = TOOL_TEMPLATE  # type: ignore[union-attr]
        return engine

    with serving(settings=make_server_settings(port=0, api_keys=(KEY,)), load=load) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=PATIENCE_S, max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def claude(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, timeout=PATIENCE_S, max_retries=0) as opened:
        yield opened


def test_openai_chats(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    whole = client.chat.completions.create(model=MODEL, messages=HI, max_completion_tokens=8)  # type: ignore[arg-type]
    stream = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=8, stream=True, stream_options={"include_usage": True}  # type: ignore[arg-type]
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_openai_parses_a_form(client: openai.OpenAI) -> None:
    class Trip(BaseModel):
        city: Literal["Paris", "Rome"]
        days: Literal[1, 2, 3]

    made = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "where to?"}], response_format=Trip, max_tokens=200,
        temperature=0,
    )  # fmt: skip
    assert isinstance(made.choices[0].message.parsed, Trip)


def test_openai_calls_a_tool(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
    ask: Any = {"model": MODEL, "messages": HI, "tools": [tool], "tool_choice": "required", "max_tokens": 100}
    made = client.chat.completions.create(**ask, parallel_tool_calls=False)
    assert made.choices[0].message.tool_calls
    arguments = ""
    for chunk in client.chat.completions.create(**ask, parallel_tool_calls=False, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.function is not None
            arguments += call.function.arguments or ""
    assert json.loads(arguments)["city"] in {"Paris", "Rome"}


def test_openai_completions(client: openai.OpenAI) -> None:
    made = client.completions.create(model=MODEL, prompt="def f(x):", max_tokens=1, echo=True, logprobs=1, n=2)
    assert len(made.choices) == 2
    logprobs = made.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and "".join(logprobs.tokens) == made.choices[0].text


def test_openai_responses(client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="hi", max_output_tokens=8, store=False)
    with client.responses.stream(model=MODEL, input="hi", max_output_tokens=8, store=False) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] in {"response.completed", "response.incomplete"}
    assert final.output_text == made.output_text and made.output_text


def test_openai_errors(client: openai.OpenAI, server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=MODEL, messages=HI, temperature=-1)  # type: ignore[arg-type]
    assert raised.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match=MODEL):
        client.chat.completions.create(model="gpt-9", messages=HI)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 4000}])
    assert raised.value.code == "context_length_exceeded"
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    ask: Any = {"model": MODEL, "messages": HI, "max_tokens": 8}
    made = claude.messages.create(**ask, system="Be kind.")
    with claude.messages.stream(**ask, system="Be kind.") as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert isinstance(made.content[0], anthropic.types.TextBlock)
    assert text == made.content[0].text
    assert final.stop_reason == made.stop_reason
    counted = claude.messages.count_tokens(model=MODEL, messages=ask["messages"], system="Be kind.")
    usage = made.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_anthropic_calls_a_tool(claude: anthropic.Anthropic) -> None:
    tool: Any = {"name": "get_weather", "description": "d", "input_schema": PARAMETERS}
    choice: Any = {"type": "tool", "name": "get_weather"}
    ask: Any = {"model": MODEL, "messages": HI, "max_tokens": 100, "tools": [tool], "tool_choice": choice}
    made = claude.messages.create(**ask)
    assert made.stop_reason == "tool_use"
    with claude.messages.stream(**ask) as stream:
        final = stream.get_final_message()
    for message in (made, final):
        call = next(block for block in message.content if isinstance(block, anthropic.types.ToolUseBlock))
        assert call.name == "get_weather" and isinstance(call.input, dict)
        assert call.input["city"] in {"Paris", "Rome"}


def test_anthropic_errors(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(model=MODEL, messages=HI, max_tokens=0)  # type: ignore[arg-type]
    with pytest.raises(anthropic.NotFoundError, match=MODEL):
        claude.messages.create(model="claude", messages=HI, max_tokens=1)  # type: ignore[arg-type]
