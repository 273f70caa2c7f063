"""OpenAI's endpoints: check a request off the event loop, put it into the queue, answer in its form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from offmoe.engine.engine import Engine
from offmoe.server.chat_prompt import engine_messages, template_kwargs
from offmoe.server.chats import ChatAsk, begin_chat
from offmoe.server.errors import invalid
from offmoe.server.openai.chat import ChatHead, ChatJsonForm, ChatStreamForm
from offmoe.server.openai.completions import CompletionHead, CompletionJsonForm, CompletionStreamForm
from offmoe.server.openai.logprobs import TokenNames
from offmoe.server.openai.options import chat_options, completion_options
from offmoe.server.openai.responses_ask import responses_ask
from offmoe.server.openai.responses_form import ResponseHead, ResponsesJsonForm, ResponsesStreamForm
from offmoe.server.openai.responses_schemas import ResponsesRequest
from offmoe.server.openai.schemas import ChatRequest, CompletionRequest
from offmoe.server.prepare import Generation, PlainReader
from offmoe.server.serving import answer_request, new_generation, reply_options
from offmoe.server.state import ServedModel

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: HttpRequest) -> Response:
    """A chat's next message."""
    return await answer_request(request, ChatRequest, _prepare_chat)


def _prepare_chat(asked: ChatRequest, served: ServedModel, request: HttpRequest) -> tuple[Any, Generation]:
    engine = served.engine
    choice = asked.tool_choice or "auto"
    num_prompt, generation = begin_chat(
        ChatAsk(
            messages=engine_messages(asked, served.settings),
            options=chat_options(asked, served.settings, engine.context_length),
            template_kwargs=template_kwargs(asked, engine.tokenizer), num=asked.n or 1,
            tools=[tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in asked.tools or ()],
            choice=choice if isinstance(choice, str) else choice.function.name,
            is_parallel=asked.parallel_tool_calls is not False, continues=bool(asked.continue_final_message),
        ),
        served, request,
    )  # fmt: skip
    head = ChatHead(
        model=served.name, num_prompt=num_prompt, num_choices=asked.n or 1, names=TokenNames(engine.tokenizer),
        wants_logprobs=bool(asked.logprobs),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        shows_progress=bool(asked.return_progress),
    )  # fmt: skip
    return ChatStreamForm(head) if asked.stream else ChatJsonForm(head), generation


@router.post("/v1/responses")
async def responses(request: HttpRequest) -> Response:
    """A response, without memory of earlier ones."""
    return await answer_request(request, ResponsesRequest, _prepare_response)


def _prepare_response(asked: ResponsesRequest, served: ServedModel, request: HttpRequest) -> tuple[Any, Generation]:
    num_prompt, generation = begin_chat(responses_ask(asked, served.settings, served.engine), served, request)
    head = ResponseHead(asked, served.name, num_prompt)
    return ResponsesStreamForm(head) if asked.stream else ResponsesJsonForm(head), generation


@router.post("/v1/completions")
async def completions(request: HttpRequest) -> Response:
    """Text that goes on from a prompt."""
    return await answer_request(request, CompletionRequest, _prepare_completion)


def _prepare_completion(asked: CompletionRequest, served: ServedModel, request: HttpRequest) -> tuple[Any, Generation]:
    engine, num = served.engine, asked.n or 1
    options = completion_options(asked, served.settings)
    generation = new_generation(served)
    found: list[list[int]] = []
    for prompt in _prompts(asked, served):
        for given in reply_options(options, num, request, served):
            stream = engine.stream(prompt, queued=True, on_progress=generation.on_progress, **given)
            generation.add(stream, PlainReader(len(found)))
            found.append(list(stream.prompt_ids))
    head = CompletionHead(
        model=served.name, prompts=found, echoed=[_text(engine, ids) for ids in found] if asked.echo else None,
        num_prompt=sum(map(len, found[::num])), num_choices=len(found), names=TokenNames(engine.tokenizer),
        num_logprobs=options.get("logprobs"),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
    )  # fmt: skip
    return CompletionStreamForm(head) if asked.stream else CompletionJsonForm(head), generation


def _prompts(asked: CompletionRequest, served: ServedModel) -> list[Any]:
    """The prompts as a list, each a text or ids."""
    given = asked.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise invalid("the prompt is empty", "prompt", "invalid_value")
    if len(given) * (asked.n or 1) > served.settings.max_n * 8:
        raise invalid(f"{len(given)} prompts; at most {served.settings.max_n * 8} replies", "prompt", "invalid_value")
    return list(given)


def _text(engine: Engine, ids: Sequence[int]) -> str:
    if engine.tokenizer is None:
        return ""
    text = engine.tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text
