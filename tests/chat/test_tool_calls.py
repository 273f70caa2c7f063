"""Calls of tools in the forms that families write them, read as they come, cut anywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

from offmoe.chat.channel_calls import ChannelCalls
from offmoe.chat.tool_calls import (
    CallArguments,
    CallEnded,
    CallStarted,
    JsonScan,
    MarkedCalls,
    ReplyPart,
    ReplyText,
    ToolParser,
    schemas_of,
)
from offmoe.chat.tool_formats import TOOL_FORMATS, find_tool_format

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}  # fmt: skip
PARIS: dict[str, Any] = {"city": "Paris", "days": 3}
P = json.dumps(PARIS)
# Form, then a reply with text and two calls of the weather in it.
REPLIES = {
    "json tags": f'I look.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {P}}}\n</tool_call>\n<tool_call>\n'
    f'{{"name": "get_weather", "arguments": {P}}}\n</tool_call>',
    "function tags": "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n"
    "<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    "glm": "I look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
    "<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
    "minimax": 'I look.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
    '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="get_weather">\n<parameter name="city">Paris'
    '</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>',
    "mistral": f"I look.[TOOL_CALLS]get_weather[ARGS]{P}[TOOL_CALLS]get_weather[ARGS]{P}",
    "granite": f'I look.<|tool_call|>[{{"name": "get_weather", "arguments": {P}}}, {{"name": "get_weather", '
    f'"arguments": {P}}}]',
    "kimi": "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    f"{P}<|tool_call_end|><|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>{P}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
    "deepseek": "I look.<｜tool▁calls▁begin｜>"
    + 2 * f"<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{P}<｜tool▁call▁end｜>"
    + "<｜tool▁calls▁end｜>",
    "deepseek v3": "I look.<｜tool▁calls▁begin｜>"
    + 2 * (f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{P}\n```<｜tool▁call▁end｜>")
    + "<｜tool▁calls▁end｜>",
}  # fmt: skip
FORMS = {form.name: form for form in TOOL_FORMATS}


def read(parser: ToolParser, text: str, size: int) -> list[ReplyPart]:
    parts: list[ReplyPart] = []
    for begin in range(0, len(text), size):
        parts += parser.add(text[begin : begin + size])
    return parts + parser.flush()


def summary(parts: list[ReplyPart]) -> tuple[str, str, list[tuple[str, Any]]]:
    """(reasoning, answer, calls)"""
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallStarted):
            calls.append([part.name, ""])
        elif isinstance(part, CallArguments):
            calls[-1][1] += part.text
    texts = [part for part in parts if isinstance(part, ReplyText)]
    assert sum(isinstance(part, CallEnded) for part in parts) <= len(calls)
    return (
        "".join(part.text for part in texts if part.reasoning),
        "".join(part.text for part in texts if not part.reasoning),
        [(name, json.loads(text)) for name, text in calls],
    )


def test_every_form_is_tried() -> None:
    assert set(REPLIES) == set(FORMS)


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_two_calls_in_each_form(name: str, size: int) -> None:
    parser = MarkedCalls(FORMS[name], schemas_of([WEATHER]))
    assert summary(read(parser, REPLIES[name], size)) == ("", "I look.", [("get_weather", PARIS)] * 2)


@pytest.mark.parametrize("name", REPLIES)
def test_a_form_is_found_by_its_template(name: str) -> None:
    found = find_tool_format("{% if tools %}" + " ".join(FORMS[name].shown) + "{% endif %}")
    assert found is not None and found.name == name
    assert find_tool_format("{{ messages }}") is None


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.head is not None])
def test_arguments_come_before_the_call_is_complete(name: str) -> None:
    parser = MarkedCalls(FORMS[name], schemas_of([WEATHER]))
    begun = parser.add(REPLIES[name][: REPLIES[name].index('"Paris"') + 3])
    assert summary_of_begun(begun) == ("get_weather", '{"city": "Pa')


def summary_of_begun(parts: list[ReplyPart]) -> tuple[str, str]:
    names = [part.name for part in parts if isinstance(part, CallStarted)]
    return names[0], "".join(part.text for part in parts if isinstance(part, CallArguments))


def test_text_without_calls_comes_at_once_and_whole() -> None:
    parser = MarkedCalls(FORMS["json tags"], {})
    assert parser.add("a < b and <tool") == [ReplyText("a < b and")]
    assert parser.add("box>") == [ReplyText(" <toolbox>")]
    text = "Two lines,\n\nand a tail.  \n"
    for size in (1, 5, 100):
        assert summary(read(MarkedCalls(FORMS["json tags"], {}), text, size))[1] == text


def test_what_looks_like_a_call_and_is_none_is_text() -> None:
    text = "<tool_call>not json</tool_call> after"
    for size in (1, 100):
        assert summary(read(MarkedCalls(FORMS["json tags"], {}), text, size)) == ("", text, [])


def test_a_call_that_is_cut_keeps_what_there_is() -> None:
    parser = MarkedCalls(FORMS["json tags"], {})
    parts = read(parser, '<tool_call>{"name": "f", "arguments": {"a": [1, 2', 4)
    assert CallStarted("f") in parts
    assert "".join(part.text for part in parts if isinstance(part, CallArguments)) == '{"a": [1, 2'


def test_arguments_in_another_order_and_of_other_types() -> None:
    turned = '<tool_call>{"arguments": {"a": "}"}, "name": "f"}</tool_call>'
    assert summary(read(MarkedCalls(FORMS["json tags"], {}), turned, 3))[2] == [("f", {"a": "}"})]
    glm = MarkedCalls(FORMS["glm"], {"f": {"text": {"type": "string"}}})
    pairs = "".join(f"<arg_key>{key}</arg_key><arg_value>12</arg_value>" for key in ("text", "n"))
    assert summary(read(glm, f"<tool_call>f{pairs}</tool_call>", 9))[2] == [("f", {"text": "12", "n": 12})]


def test_json_scan_ends_at_the_objects_end() -> None:
    scan = JsonScan()
    assert scan.take('{"a": "\\"}{", "b": [') == '{"a": "\\"}{", "b": ['
    assert scan.take("{}]}} tail") == "{}]}"
    assert scan.take("more") == "" and scan.is_done


HARMONY = (
    "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    f"<|constrain|>json<|message|>{P}"
)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_channels_of_gpt_oss(size: int) -> None:
    assert summary(read(ChannelCalls(), HARMONY, size)) == ("Let me see.", "", [("get_weather", PARIS)])
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    other = f"{thought} to=functions.f<|channel|>commentary json<|message|>{P}"
    assert summary(read(ChannelCalls(), other, size)) == ("Hm.", "", [("f", PARIS)])
    answer = f"{thought}<|channel|>final<|message|>Hello."
    assert summary(read(ChannelCalls(), answer, size)) == ("Hm.", "Hello.", [])
