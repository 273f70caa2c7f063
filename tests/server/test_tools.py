"""Tools, forms of answers and reasoning through the three APIs for chats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from http_servers import HI, connect, refused, serving
from scripted_engine import TOOL_TEMPLATE, ScriptedEngine

import offmoe
from offmoe.server.serve import RunningServer

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CITY = {"type": "string", "enum": ["Paris", "Rome"]}
PARAMETERS = {"type": "object", "properties": {"city": CITY}, "required": ["city"]}
IMAGE = {"type": "input_image", "image_url": "http://x"}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "tell_time"}}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    def load(progress: Any) -> Any:
        engine = offmoe.load(ram="1GiB", progress=progress)
        engine.tokenizer.chat_template = TOOL_TEMPLATE  # type: ignore[union-attr]
        return ScriptedEngine(engine)

    with serving(load=load) as running:
        yield running


@pytest.fixture
def engine(server: RunningServer) -> ScriptedEngine:
    found: Any = server.served.engine
    assert isinstance(found, ScriptedEngine)
    found.reason, found.stop_reason, found.script = "stop", None, ""
    return found


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with connect(server) as opened:
        yield opened


def post(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert isinstance(found, dict)
    return found


def stream(client: httpx.Client, path: str, **fields: Any) -> list[dict[str, Any]]:
    """Events with their names."""
    found, name = [], None
    with client.stream("POST", path, json={"stream": True, **fields}) as answer:
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: ") and line != "data: [DONE]":
                found.append(json.loads(line.removeprefix("data: ")))
                assert name is None or found[-1]["type"] == name
    return found


# ---- chat completions ----


def test_a_call_and_the_text_before_it(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = f"<think>Hm.</think>I look.\n\n{CALL}"
    reply = post(client, "/v1/chat/completions", messages=HI, tools=[TOOL])
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    assert choice["message"]["reasoning_content"] == "Hm."
    call = choice["message"]["tool_calls"][0]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert engine.asked["chat_template_kwargs"]["tools"] == [TOOL]
    assert "strict" not in json.dumps(engine.asked["chat_template_kwargs"])


def test_calls_alone_have_no_content(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = CALL + CALL
    message = post(client, "/v1/chat/completions", messages=HI, tools=[TOOL])["choices"][0]["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 2
    assert message["tool_calls"][0]["id"] != message["tool_calls"][1]["id"]


def test_a_streamed_call_begins_with_its_name(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = f"I look.\n{CALL}{CALL}"
    deltas = [chunk["choices"][0] for chunk in stream(client, "/v1/chat/completions", messages=HI, tools=[TOOL])]
    calls = [call for delta in deltas for call in delta["delta"].get("tool_calls", [])]
    begins = [call for call in calls if "id" in call]
    assert [(call["index"], call["function"]["name"]) for call in begins] == [(0, "get_weather"), (1, "get_weather")]
    for index in (0, 1):
        pieces = [call["function"]["arguments"] for call in calls if call["index"] == index]
        assert json.loads("".join(pieces)) == {"city": "Paris"}
        assert len(pieces) > 2, "arguments come as they are written"
    assert deltas[-1]["finish_reason"] == "tool_calls"
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == "I look."


def test_one_call_at_most_where_that_is_asked_for(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = CALL + CALL
    reply = post(client, "/v1/chat/completions", messages=HI, tools=[TOOL], parallel_tool_calls=False)
    assert len(reply["choices"][0]["message"]["tool_calls"]) == 1
    assert reply["choices"][0]["finish_reason"] == "tool_calls"


def test_no_tools_where_none_may_be_called(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = "No."
    post(client, "/v1/chat/completions", messages=HI, tools=[TOOL], tool_choice="none")
    assert "tools" not in engine.asked["chat_template_kwargs"]


def test_a_result_goes_back_into_the_prompt(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = "Sunny."
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *HI, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "22 degrees"},
    ]  # fmt: skip
    post(client, "/v1/chat/completions", messages=messages, tools=[TOOL])
    said = engine.asked["messages"]
    assert said[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert said[2] == {"role": "tool", "content": "22 degrees", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "has space"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
         "tools[0].function.parameters.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "required", "regex": "a"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object"}, "grammar": "x"}, "grammar"),
    ],
)  # fmt: skip
def test_mistakes_in_tools_and_forms(
    client: httpx.Client, engine: ScriptedEngine, fields: dict[str, Any], param: str
) -> None:
    assert refused(client, "/v1/chat/completions", 400, messages=HI, **fields)["param"] == param


def test_the_form_of_an_answer_reaches_the_engine(client: httpx.Client, engine: ScriptedEngine) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS, "strict": True}}
    post(client, "/v1/chat/completions", messages=HI, response_format=form)
    assert engine.asked["json_schema"] == PARAMETERS
    post(client, "/v1/chat/completions", messages=HI, response_format={"type": "json_object"})
    assert engine.asked["json_schema"] is True


def test_effort_is_the_templates_switch(client: httpx.Client, engine: ScriptedEngine) -> None:
    for effort, is_on in (("none", False), ("high", True)):
        post(client, "/v1/chat/completions", messages=HI, reasoning_effort=effort)
        assert engine.asked["chat_template_kwargs"] == {"enable_thinking": is_on}


# ---- responses ----


def test_a_response(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = "<think>Hm.</think>Hello."
    reply = post(client, "/v1/responses", input="hi", instructions="Be kind.", max_output_tokens=20)
    assert (reply["object"], reply["status"], reply["error"]) == ("response", "completed", None)
    reasoning, message = reply["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "Hello." and message["role"] == "assistant"
    assert reply["usage"]["output_tokens"] == 7
    assert reply["usage"]["input_tokens_details"] == {"cached_tokens": 0}
    assert [message["role"] for message in engine.asked["messages"]] == ["system", "user"]


def test_a_response_that_is_cut_says_so(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script, engine.reason = "Hello", "length"
    reply = post(client, "/v1/responses", input="hi")
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_events_of_a_response_add_up(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = f"<think>Hm, hm.</think>I look at it.\n{CALL}"
    tool = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}
    events = stream(client, "/v1/responses", input=[{"role": "user", "content": "hi"}], tools=[tool])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    final = events[-1]["response"]["output"]
    assert [item["type"] for item in final] == ["reasoning", "message", "function_call"]
    deltas: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            deltas[event["item_id"]] = deltas.get(event["item_id"], "") + event["delta"]
    assert deltas[final[0]["id"]] == "Hm, hm." == final[0]["content"][0]["text"]
    assert deltas[final[1]["id"]] == "I look at it." == final[1]["content"][0]["text"]
    assert deltas[final[2]["id"]] == final[2]["arguments"] == '{"city": "Paris"}'
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3


def test_items_of_earlier_turns(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = "Sunny."
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "22"},
    ]
    post(client, "/v1/responses", input=items)
    said = engine.asked["messages"]
    assert [message["role"] for message in said] == ["user", "assistant", "tool"]
    assert [call["id"] for call in said[1]["tool_calls"]] == ["c1", "c2"]
    assert said[1]["reasoning_content"] == "Hm."


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"what": 1}, "what"),
    ],
)  # fmt: skip
def test_what_responses_refuse(
    client: httpx.Client, engine: ScriptedEngine, fields: dict[str, Any], param: str
) -> None:
    assert refused(client, "/v1/responses", 400, **{"input": "hi", **fields})["param"] == param


# ---- messages ----

ASK: dict[str, Any] = {"model": "demo_model", "max_tokens": 50, "messages": HI}
CLAUDE_TOOL = {"name": "get_weather", "description": "d", "input_schema": PARAMETERS}


def test_a_message(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = "<think>Hm.</think>Hello."
    reply = post(client, "/v1/messages", **ASK, system=[{"type": "text", "text": "Be kind."}])
    assert (reply["type"], reply["role"], reply["stop_reason"]) == ("message", "assistant", "end_turn")
    assert [block["type"] for block in reply["content"]] == ["thinking", "text"]
    assert reply["content"][1]["text"] == "Hello."
    assert reply["usage"]["output_tokens"] == 7 and reply["usage"]["input_tokens"] > 0
    assert engine.asked["messages"][0] == {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("reason", "stop", "expected"),
    [
        ("length", None, ("max_tokens", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("stop", None, ("end_turn", None)),
    ],
)
def test_reasons_of_a_message(
    client: httpx.Client, engine: ScriptedEngine, reason: str, stop: str | None, expected: tuple[str, str | None]
) -> None:
    engine.script, engine.reason, engine.stop_reason = "Hello", reason, stop
    reply = post(client, "/v1/messages", **ASK, stop_sequences=["END"])
    assert (reply["stop_reason"], reply["stop_sequence"]) == expected


def test_a_message_that_calls_and_what_goes_back(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = f"I look.\n{CALL}"
    reply = post(client, "/v1/messages", **ASK, tools=[CLAUDE_TOOL])
    assert reply["stop_reason"] == "tool_use"
    call = reply["content"][1]
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "22"}]}
    again = [*HI, {"role": "assistant", "content": reply["content"]}, {"role": "user", "content": [result]}]
    engine.script = "Sunny."
    post(client, "/v1/messages", **{**ASK, "messages": again}, tools=[CLAUDE_TOOL])
    said = engine.asked["messages"]
    assert [message["role"] for message in said] == ["user", "assistant", "tool"]
    assert said[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert said[2]["content"] == "22"


def test_events_of_a_message_add_up(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = f"<think>Hm.</think>I look.\n{CALL}{CALL}"
    events = stream(client, "/v1/messages", **ASK, tools=[CLAUDE_TOOL])
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert events[0]["message"]["content"] == [] and events[0]["message"]["stop_reason"] is None
    blocks: dict[int, list[Any]] = {}
    for event in events:
        if event["type"] == "content_block_start":
            blocks[event["index"]] = [event["content_block"]["type"], ""]
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            blocks[event["index"]][1] += (
                delta.get("text", "") + delta.get("thinking", "") + delta.get("partial_json", "")
            )
    assert list(blocks.values()) == [
        ["thinking", "Hm."], ["text", "I look."], ["tool_use", '{"city": "Paris"}'], ["tool_use", '{"city": "Paris"}']
    ]  # fmt: skip
    assert kinds.count("content_block_stop") == 4
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_tokens_are_counted_as_they_are_asked(client: httpx.Client, engine: ScriptedEngine) -> None:
    counted = post(client, "/v1/messages/count_tokens", messages=HI, tools=[CLAUDE_TOOL])["input_tokens"]
    asked = post(client, "/v1/messages", **ASK, tools=[CLAUDE_TOOL])["usage"]["input_tokens"]
    assert counted == asked > post(client, "/v1/messages/count_tokens", messages=HI)["input_tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0}, {"mcp_servers": [{"url": "http://x"}]}, {"what": 1}, {"model": "claude"},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]},
        {"tool_choice": {"type": "tool", "name": "g"}, "tools": [CLAUDE_TOOL]},
    ],
)  # fmt: skip
def test_errors_of_messages_have_anthropics_form(
    client: httpx.Client, engine: ScriptedEngine, fields: dict[str, Any]
) -> None:
    answer = client.post("/v1/messages", json={**ASK, **fields})
    assert answer.status_code == (404 if "model" in fields else 400)
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == ("not_found_error" if "model" in fields else "invalid_request_error")


def test_thinking_is_the_templates_switch(client: httpx.Client, engine: ScriptedEngine) -> None:
    for kind, is_on in (("enabled", True), ("disabled", False)):
        post(client, "/v1/messages", **ASK, thinking={"type": kind, "budget_tokens": 1024})
        assert engine.asked["chat_template_kwargs"] == {"enable_thinking": is_on}


# ---- forced, by the real engine ----


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_required_call_is_made_by_any_model(choice: Any) -> None:
    def load(progress: Any) -> Any:
        engine = offmoe.load(ram="1GiB", progress=progress)
        engine.tokenizer.chat_template = TOOL_TEMPLATE  # type: ignore[union-attr]
        return engine

    with serving(load=load) as server, connect(server) as client:
        fields = {
            "messages": HI,
            "tools": [TOOL, OTHER],
            "max_tokens": 120,
            "parallel_tool_calls": False,
            "temperature": 0,
        }
        reply = post(client, "/v1/chat/completions", tool_choice=choice, **fields)
        choice_made = reply["choices"][0]
        call = choice_made["message"]["tool_calls"][0]["function"]
        assert choice_made["finish_reason"] == "tool_calls"
        assert call["name"] in {"get_weather", "tell_time"}
        if isinstance(choice, dict):
            assert call["name"] == "get_weather" and json.loads(call["arguments"])["city"] in {"Paris", "Rome"}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
        answer = post(client, "/v1/chat/completions", messages=HI, response_format=form, max_tokens=120)
        assert json.loads(answer["choices"][0]["message"]["content"])["city"] in {"Paris", "Rome"}
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        error = refused(client, "/v1/chat/completions", 400, messages=HI, response_format=bad)
        assert "json_schema" in error["message"] and error["param"] == "json_schema"
