"""Anthropic's endpoints."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from offmoe.server.anthropic.ask import messages_ask
from offmoe.server.anthropic.form import MessageHead, MessageJsonForm, MessageStreamForm
from offmoe.server.anthropic.schemas import CountRequest, MessagesRequest
from offmoe.server.body import read_request
from offmoe.server.chats import begin_chat, chat_tokens
from offmoe.server.prepare import Generation
from offmoe.server.serving import answer_request, check_model, served_model
from offmoe.server.state import ServedModel

router = APIRouter()


@router.post("/v1/messages")
async def messages(request: HttpRequest) -> Response:
    """A chat's next message."""
    return await answer_request(request, MessagesRequest, _prepare)


def _prepare(asked: MessagesRequest, served: ServedModel, request: HttpRequest) -> tuple[Any, Generation]:
    num_prompt, generation = begin_chat(messages_ask(asked, served.settings, served.engine), served, request)
    head = MessageHead(served.name, num_prompt)
    return MessageStreamForm(head) if asked.stream else MessageJsonForm(head), generation


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: HttpRequest) -> Response:
    """Tokens of a chat's prompt."""
    served = served_model(request)
    asked = await read_request(request, CountRequest, served.settings)
    check_model(asked.model, served)
    return JSONResponse({"input_tokens": await run_in_threadpool(_count, asked, served)})


def _count(asked: CountRequest, served: ServedModel) -> int:
    return len(chat_tokens(messages_ask(asked, served.settings, served.engine), served))
