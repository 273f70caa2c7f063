"""Endpoints that tell of the server itself: models, health, metrics, tokens."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse, Response

from offmoe.server.body import Fields, read_request, validated
from offmoe.server.chat_prompt import engine_messages, template_kwargs
from offmoe.server.errors import ApiError, invalid
from offmoe.server.openai.schemas import ChatRequest
from offmoe.server.serving import check_model, served_model
from offmoe.server.state import ServedModel

router = APIRouter()


@router.get("/health")
async def health(request: HttpRequest) -> Response:
    """200 when the model can answer; 503 with progress before, and with the reason after a failure."""
    served: ServedModel = request.app.state.served
    if served.is_ready:
        waiting, running = len(served.queue), served.queue.num_running
        return JSONResponse({"status": "ok", "model": served.name, "waiting": waiting, "running": running})
    if served.error is not None or served.queue.is_closed:
        return JSONResponse({"status": "stopping"}, status_code=503)
    return JSONResponse(
        {"status": "loading", "progress": served.progress(), "message": served.progress_line()},
        status_code=503, headers={"Retry-After": "5"},
    )  # fmt: skip


@router.get("/v1/models")
async def models(request: HttpRequest) -> Response:
    """The model and its other names."""
    served = served_model(request)
    return JSONResponse({"object": "list", "data": [_model(served, name) for name in served.names()]})


@router.get("/v1/models/{name:path}")
async def model(request: HttpRequest, name: str) -> Response:
    """One of them."""
    served = served_model(request)
    check_model(name, served)
    return JSONResponse(_model(served, name))


def _model(served: ServedModel, name: str) -> dict[str, Any]:
    engine = served.engine
    return {
        "id": name, "object": "model", "created": served.created, "owned_by": "offmoe", "root": served.name,
        "context_length": engine.context_length, "max_model_len": engine.context_length,
        "vocab_size": engine.vocab_size, "input_modalities": ["text"], "output_modalities": ["text"],
        "has_chat_template": bool(engine.tokenizer is not None and engine.tokenizer.chat_template),
    }  # fmt: skip


@router.get("/metrics")
async def metrics(request: HttpRequest) -> Response:
    """Prometheus' text format."""
    served: ServedModel = request.app.state.served
    queue = served.queue
    text = served.measured.exposition(
        served.stats, waiting=len(queue), running=queue.num_running, refused=queue.num_refused
    )
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


class TokenizeRequest(Fields):
    """`POST /tokenize`: a text, or a chat's messages with what its prompt depends on."""

    model: str | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    content: Annotated[str, Field(min_length=1)] | None = None
    messages: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None


@router.post("/tokenize")
async def tokenize(request: HttpRequest) -> Response:
    """Ids of a text or of a chat's prompt."""
    served = served_model(request)
    asked = await read_request(request, TokenizeRequest, served.settings)
    check_model(asked.model, served)
    ids = await run_in_threadpool(_tokenize, asked, served)
    return JSONResponse({"count": len(ids), "tokens": ids, "max_model_len": served.engine.context_length})


def _tokenize(asked: TokenizeRequest, served: ServedModel) -> list[int]:
    engine, text = served.engine, asked.prompt or asked.content
    if (text is None) == (asked.messages is None):
        raise invalid("give prompt or messages, one of the two", "prompt")
    if text is not None:
        if asked.add_special_tokens is False:
            if engine.tokenizer is None:
                raise invalid("the model has no tokenizer", "prompt")
            return list(engine.tokenizer.encode(text, add_special_tokens=False))
        return engine.tokenize(text)
    fields = {"messages": asked.messages, "chat_template_kwargs": asked.chat_template_kwargs}
    chat = validated({name: value for name, value in fields.items() if value is not None}, ChatRequest)
    return engine.tokenize_chat(
        engine_messages(chat, served.settings), chat_template_kwargs=template_kwargs(chat, engine.tokenizer)
    )


def not_found(request: HttpRequest) -> ApiError:
    """An address that there is not."""
    return ApiError(404, f"{request.method} {request.url.path[:200]} is no endpoint", code="not_found")
