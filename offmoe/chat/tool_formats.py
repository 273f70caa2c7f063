"""Forms in which models write calls of tools: marks, and how a call's text is read. A family's form is a record.

A form is found by what the model's chat template shows of it. `head` matches the begin of a call whose arguments are
JSON text as they stand, so that they can be passed on as they come; other forms are read when a call is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# (name, arguments as JSON text)
CalledPair = tuple[str, str]
# Name of a tool -> JSON schemas of its parameters by name.
ToolSchemas = Mapping[str, Mapping[str, Any]]

_JSON_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """One form. `shown`: texts that templates with this form have. `opens` begins a call and `closes` ends it; without
    `closes` the reply's end does. `ignored`: marks around several calls. `forced`: pieces of a grammar around a call's
    JSON, {name} and {arguments} or {call} in it; None where a call is no JSON.
    """

    name: str
    shown: tuple[str, ...]
    opens: str
    closes: str
    parse: Callable[[str, ToolSchemas], list[CalledPair]]
    head: re.Pattern[str] | None = None
    ignored: tuple[str, ...] = ()
    forced: tuple[str, ...] | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """All of its marks."""
        return tuple(mark for mark in (self.opens, self.closes, *self.ignored) if mark)


def parse_json_call(body: str, schemas: ToolSchemas) -> list[CalledPair]:
    """`{"name": ..., "arguments": {...}}`, or a list of such. Raises ValueError."""
    value = json.loads(body)
    return [_pair(item) for item in (value if isinstance(value, list) else [value])]


def _pair(item: Any) -> CalledPair:
    found = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ValueError("no call")
    arguments = found.get("arguments", found.get("parameters", {}))
    return found["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _parse_named(pattern: str) -> Callable[[str, ToolSchemas], list[CalledPair]]:
    """A name, a mark, and JSON."""
    compiled = re.compile(pattern, re.DOTALL)

    def parse(body: str, schemas: ToolSchemas) -> list[CalledPair]:
        if (match := compiled.fullmatch(body)) is None:
            raise ValueError("no call")
        json.loads(match["arguments"])
        return [(match["name"].strip(), match["arguments"].strip())]

    return parse


def _parse_tags(call: str, parameter: str) -> Callable[[str, ToolSchemas], list[CalledPair]]:
    """A name, and a tag for each argument whose text is JSON only where the tool's schema asks for no text."""
    calls, parameters = re.compile(call, re.DOTALL), re.compile(parameter, re.DOTALL)

    def parse(body: str, schemas: ToolSchemas) -> list[CalledPair]:
        found = []
        for match in calls.finditer(body):
            types = schemas.get(match["name"].strip(), {})
            arguments = {
                each["key"].strip(): _value(each["value"], types.get(each["key"].strip()))
                for each in parameters.finditer(match["inner"])
            }
            found.append((match["name"].strip(), json.dumps(arguments, ensure_ascii=False)))
        if not found:
            raise ValueError("no call")
        return found

    return parse


def _value(text: str, schema: Any) -> Any:
    wanted = schema.get("type") if isinstance(schema, Mapping) else None
    if wanted == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


_MISTRAL_CALL = r"\s*(?P<name>[^\[{]+)(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?(?P<arguments>\{.*\})\s*"


def _parse_mistral(body: str, schemas: ToolSchemas) -> list[CalledPair]:
    if body.lstrip().startswith("["):
        return parse_json_call(body, schemas)
    return _parse_named(r"\s*(?P<name>[^\[{]+)(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?(?P<arguments>\{.*\})\s*")(
        body, schemas
    )


_SEP, _CALL_BEGIN, _CALL_END = "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_ALL_BEGIN, _ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"

TOOL_FORMATS = (
    ToolFormat(
        name="minimax", shown=("<minimax:tool_call>",), opens="<minimax:tool_call>", closes="</minimax:tool_call>",
        parse=_parse_tags(
            r'<invoke name="?(?P<name>[^">]+)"?>(?P<inner>.*?)</invoke>',
            r'<parameter name="?(?P<key>[^">]+)"?>\n?(?P<value>.*?)\n?</parameter>',
        ),
    ),
    ToolFormat(
        name="glm", shown=("<arg_key>",), opens="<tool_call>", closes="</tool_call>",
        parse=_parse_tags(
            r"(?P<name>[^<\n]+)(?P<inner>.*)",
            r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
        ),
    ),
    ToolFormat(
        name="function tags", shown=("<function=",), opens="<tool_call>", closes="</tool_call>",
        parse=_parse_tags(
            r"<function=(?P<name>[^>\n]+)>(?P<inner>.*?)</function>",
            r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>",
        ),
    ),
    ToolFormat(
        name="deepseek v3", shown=(_ALL_BEGIN, "```json"), opens=_CALL_BEGIN, closes=_CALL_END,
        ignored=(_ALL_BEGIN, _ALL_END),
        parse=_parse_named(rf"\s*function{_SEP}(?P<name>[^\n]+)\n```json\n(?P<arguments>.*?)\n?```\s*"),
    ),
    ToolFormat(
        name="deepseek", shown=(_ALL_BEGIN,), opens=_CALL_BEGIN, closes=_CALL_END, ignored=(_ALL_BEGIN, _ALL_END),
        parse=_parse_named(rf"\s*(?P<name>[^<｜]+){_SEP}(?P<arguments>.*)"),
        head=re.compile(rf"\s*([^<｜]+){_SEP}\s*(?=\{{)"),
        forced=(_ALL_BEGIN, _CALL_BEGIN, "{name}", _SEP, "{arguments}", _CALL_END, _ALL_END),
    ),
    ToolFormat(
        name="kimi", shown=("<|tool_calls_section_begin|>",), opens="<|tool_call_begin|>", closes="<|tool_call_end|>",
        ignored=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        parse=_parse_named(
            r"\s*(?:functions\.)?(?P<name>[^:<\s]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>(?P<arguments>.*)"
        ),
        head=re.compile(r"\s*(?:functions\.)?([^:<\s]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*(?=\{)"),
        forced=(
            "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "functions.{name}:0",
            "<|tool_call_argument_begin|>", "{arguments}", "<|tool_call_end|>", "<|tool_calls_section_end|>",
        ),
    ),
    ToolFormat(
        name="mistral", shown=("[TOOL_CALLS]",), opens="[TOOL_CALLS]", closes="", parse=_parse_mistral,
        head=re.compile(r"\s*([^\[{\s]+)\s*(?:\[CALL_ID\][^\[]*)?\[ARGS\]\s*(?=\{)"),
    ),
    ToolFormat(
        name="granite", shown=("<|tool_call|>",), opens="<|tool_call|>", closes="", parse=parse_json_call,
        forced=("<|tool_call|>", "[", "{call}", "]"),
    ),
    ToolFormat(
        name="json tags", shown=("<tool_call>",), opens="<tool_call>", closes="</tool_call>", parse=parse_json_call,
        head=_JSON_HEAD, forced=("<tool_call>", "\n", "{call}", "\n", "</tool_call>"),
    ),
)  # fmt: skip


def find_tool_format(template: str) -> ToolFormat | None:
    """The form that a chat template shows; None where it shows none of those known here."""
    return next((form for form in TOOL_FORMATS if all(text in template for text in form.shown)), None)
