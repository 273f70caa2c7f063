"""Chats of every API in one form: messages, tools and options, made into replies of the engine."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest

from offmoe.chat.channel_calls import ChannelCalls
from offmoe.chat.reasoning import make_splitter
from offmoe.chat.template import template_text
from offmoe.chat.templated_calls import TemplatedCalls
from offmoe.chat.tool_calls import (
    CallArguments,
    CallEnded,
    CallStarted,
    MarkedCalls,
    ReplyPart,
    ReplyText,
    ToolParser,
    schemas_of,
)
from offmoe.chat.tool_formats import find_tool_format
from offmoe.chat.tool_grammar import forced_grammar
from offmoe.engine.engine import Engine
from offmoe.engine.stream import Chunk
from offmoe.hf.response_parser import make_response_parser
from offmoe.server.errors import invalid
from offmoe.server.events import Event, TextDelta, ToolCallArguments, ToolCallBegin
from offmoe.server.prepare import Generation, PlainReader, ReplyReader
from offmoe.server.serving import new_generation, reply_options
from offmoe.server.settings import ServerSettings
from offmoe.server.state import ServedModel

_CHANNEL = "<|channel|>"


@dataclass(frozen=True, kw_only=True)
class ChatAsk:
    """A chat as every API asks for it.

    `tools` as templates take them; `choice`: auto, none, required, or the name of a tool. `num`: replies wanted.
    """

    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[dict[str, Any]] = ()
    choice: str = "auto"
    is_parallel: bool = True
    num: int = 1
    continues: bool = False


def begin_chat(ask: ChatAsk, served: ServedModel, request: HttpRequest) -> tuple[int, Generation]:
    """The prompt's length, and the replies, checked. Raises ApiError and the engine's errors."""
    engine = served.engine
    tools = _chosen(ask, served.settings)
    kwargs, options = dict(ask.template_kwargs), dict(ask.options)
    if tools:
        _check_template(engine)
        kwargs["tools"] = list(tools)
        if ask.choice != "auto":
            options |= _forced(ask, tools, engine)
    generation = new_generation(served)
    num_prompt = 0
    for index, given in enumerate(reply_options(options, ask.num, request, served)):
        stream = engine.stream_chat(
            [dict(message) for message in ask.messages], chat_template_kwargs=kwargs,
            continue_final_message=ask.continues, raw=bool(tools), queued=True, on_progress=generation.on_progress,
            **given,
        )  # fmt: skip
        num_prompt = len(stream.prompt_ids)
        reader: ReplyReader = PlainReader(index)
        if tools:
            reader = ToolReader(engine, list(stream.prompt_ids), index, tools, is_parallel=ask.is_parallel)
        generation.add(stream, reader)
    return num_prompt, generation


def chat_tokens(ask: ChatAsk, served: ServedModel) -> list[int]:
    """Ids of the chat's prompt."""
    kwargs = dict(ask.template_kwargs)
    if tools := _chosen(ask, served.settings):
        _check_template(served.engine)
        kwargs["tools"] = list(tools)
    return served.engine.tokenize_chat(
        [dict(message) for message in ask.messages], chat_template_kwargs=kwargs, continue_final_message=ask.continues
    )


def _chosen(ask: ChatAsk, settings: ServerSettings) -> Sequence[dict[str, Any]]:
    """Tools that the model is told of. Raises ApiError for what is none, with its path."""
    if len(ask.tools) > settings.max_tools:
        raise invalid(f"{len(ask.tools)} tools; at most {settings.max_tools}", "tools", "invalid_value")
    names = [tool["function"]["name"] for tool in ask.tools]
    for number, tool in enumerate(ask.tools):
        path = f"tools[{number}].function"
        if names.index(names[number]) != number:
            raise invalid(f"two tools are called {names[number]!r}", f"{path}.name", "invalid_value")
        parameters = tool["function"].get("parameters")
        if parameters is not None and parameters.get("type", "object") != "object":
            raise invalid(
                f"parameters of a tool are an object, not {parameters['type']!r}", f"{path}.parameters.type",
                "invalid_value",
            )  # fmt: skip
        if parameters is not None and not isinstance(parameters.get("properties", {}), dict):
            raise invalid("properties are an object", f"{path}.parameters.properties", "invalid_value")
        if len(json.dumps(tool)) > settings.max_schema_bytes:
            raise invalid(f"a tool has more than {settings.max_schema_bytes} characters", path, "invalid_value")
    if ask.choice == "none":
        return ()
    if ask.choice in {"auto", "required"}:
        if ask.choice == "required" and not ask.tools:
            raise invalid("tool_choice is required, and there are no tools", "tool_choice", "invalid_value")
        return ask.tools
    if ask.choice not in names:
        raise invalid(f"no tool is called {ask.choice!r}; known: {', '.join(names)}", "tool_choice", "invalid_value")
    return [tool for tool, name in zip(ask.tools, names, strict=True) if name == ask.choice]


def _check_template(engine: Engine) -> None:
    template = _template(engine)
    if "tools" not in template:
        raise invalid("the model's chat template has no place for tools", "tools", "unsupported_parameter")
    has_parser = getattr(engine.tokenizer, "response_template", None) is not None or _CHANNEL in template
    if not has_parser and find_tool_format(template) is None:
        raise invalid(
            "the model's chat template shows no form of calls that offmoe reads", "tools", "unsupported_parameter"
        )


def _template(engine: Engine) -> str:
    template = engine.tokenizer.chat_template if engine.tokenizer is not None else None
    if isinstance(template, dict) and "tool_use" in template:
        return str(template["tool_use"])
    return template_text(engine.tokenizer) if engine.tokenizer is not None else ""


def _forced(ask: ChatAsk, tools: Sequence[dict[str, Any]], engine: Engine) -> dict[str, Any]:
    """A grammar by which the reply is a call. Raises ApiError for families whose calls are no JSON."""
    form = find_tool_format(_template(engine))
    vocabulary = engine.tokenizer.get_vocab() if engine.tokenizer is not None else {}
    grammar = (
        None if form is None or _CHANNEL in _template(engine)
        else forced_grammar(form, tools, vocabulary.get, parallel=ask.is_parallel and ask.choice == "required")
    )  # fmt: skip
    if grammar is None:
        raise invalid(
            "tool_choice: this model's form of calls cannot be forced; use auto or none", "tool_choice",
            "unsupported_parameter",
        )  # fmt: skip
    for name in ("grammar", "regex", "json_schema"):
        if name in ask.options:
            raise invalid("tool_choice and a form of the answer are two rules for one reply", "tool_choice")
    return {"grammar": grammar}


class ToolReader:
    """A reply in which tools may be called: reasoning, text and calls, told apart as they come."""

    def __init__(
        self, engine: Engine, prompt_ids: Sequence[int], index: int, tools: Sequence[dict[str, Any]], *,
        is_parallel: bool,
    ) -> None:  # fmt: skip
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        self._index, self._is_parallel = index, is_parallel
        self._splitter: Any = None
        self._parser: ToolParser
        prompt = str(tokenizer.decode(list(prompt_ids), skip_special_tokens=False))
        template = _template(engine)
        if (templated := make_response_parser(tokenizer, prompt, tools)) is not None:
            self._parser = TemplatedCalls(templated)
        elif _CHANNEL in template:
            self._parser = ChannelCalls()
        else:
            form = find_tool_format(template)
            assert form is not None, "checked before"
            self._parser = MarkedCalls(form, schemas_of(tools))
            self._splitter, _ = make_splitter(tokenizer, prompt_ids)
        self._num_calls = 0
        self.is_complete = False

    @property
    def calls_tools(self) -> bool:
        """See ReplyReader."""
        return self._num_calls > 0

    def add(self, chunk: Chunk) -> Iterator[Event]:
        """See ReplyReader."""
        if self.is_complete:
            return
        parts: list[ReplyPart] = []
        if self._splitter is None:
            parts = self._parser.add(chunk.text)
        else:
            for is_reasoning, text in self._splitter.add(chunk.text):
                parts += [ReplyText(text, reasoning=True)] if is_reasoning else self._parser.add(text)
        yield from self._events(parts, chunk)

    def end(self) -> Iterator[Event]:
        """See ReplyReader."""
        if self.is_complete:
            return
        parts: list[ReplyPart] = []
        if self._splitter is not None:
            for is_reasoning, text in self._splitter.flush():
                parts += [ReplyText(text, reasoning=True)] if is_reasoning else self._parser.add(text)
        yield from self._events([*parts, *self._parser.flush()], None)

    def _events(self, parts: Sequence[ReplyPart], chunk: Chunk | None) -> Iterator[Event]:
        """Events of the parts. The token belongs to the last text, or to one without letters."""
        texts = [part for part in parts if isinstance(part, ReplyText)]
        ids, logprobs = (chunk.token_ids, chunk.logprobs) if chunk is not None else ((), None)
        for part in parts:
            if isinstance(part, ReplyText):
                is_last = part is texts[-1]
                yield TextDelta(
                    self._index, part.text, part.reasoning, ids if is_last else (), logprobs if is_last else None
                )
            elif isinstance(part, CallStarted):
                call_id = f"call_{uuid.uuid4().hex[:24]}"
                yield ToolCallBegin(self._index, self._num_calls, call_id, part.name)
                self._num_calls += 1
            elif isinstance(part, CallArguments):
                yield ToolCallArguments(self._index, self._num_calls - 1, part.text)
            elif isinstance(part, CallEnded) and not self._is_parallel:
                self.is_complete = True
                return
        if not texts and ids:
            yield TextDelta(self._index, "", False, ids, logprobs)
