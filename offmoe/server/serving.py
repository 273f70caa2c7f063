"""Steps that the endpoints share: the model of a request, its client, its place in the queue, and its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from offmoe.server.body import ModelRequest, read_request
from offmoe.server.errors import ApiError, error_body
from offmoe.server.jobs import ServerJob
from offmoe.server.prepare import Generation
from offmoe.server.responses import JsonResponse, SseResponse
from offmoe.server.state import ServedModel

Asked = TypeVar("Asked", bound=ModelRequest)


def served_model(request: HttpRequest) -> ServedModel:
    """The server's model; raises ApiError 503 while it is loading."""
    served = request.app.state.served
    assert isinstance(served, ServedModel)
    _ = served.engine
    return served


def check_model(name: str | None, served: ServedModel) -> None:
    """Raise ApiError 404 for another model, naming those that there are."""
    if name is not None and name not in served.names():
        raise ApiError(
            404, f"the model {name[:200]!r} is not here; known: {', '.join(served.names())}", param="model",
            code="model_not_found",
        )  # fmt: skip


def api_key(request: HttpRequest) -> str | None:
    """The key that the request came with, where keys are asked for."""
    key = request.scope.get("state", {}).get("api_key")
    assert key is None or isinstance(key, str)
    return key


def client_of(request: HttpRequest) -> str:
    """Name of who asks, for the order of the queue: the key, else the address."""
    key = api_key(request)
    return f"key {key}" if key is not None else f"at {request.client.host if request.client else ''}"


def reply_options(
    options: dict[str, Any], num: int, request: HttpRequest, served: ServedModel
) -> Sequence[dict[str, Any]]:
    """Options of each of `num` replies: seeds one after another, and the name under which the prompt is kept."""
    salt = served.salt(api_key(request))
    salted = options if salt is None else {**options, "cache_salt": salt}
    seed = options.get("seed")
    return [salted if seed is None else {**salted, "seed": seed + number} for number in range(num)]


def new_generation(served: ServedModel) -> Generation:
    """An empty one, which the server counts."""
    return Generation(
        served.engine, timeout_s=served.settings.timeout_s, after_token=served.after_token, on_end=served.on_end
    )


async def answer_request(
    request: HttpRequest,
    schema: type[Asked],
    prepare: Callable[[Asked, ServedModel, HttpRequest], tuple[Any, Generation]],
) -> Response:
    """Read a request and put it into the queue. `prepare`, off the event loop, gives its form and replies."""
    served = served_model(request)
    asked = await read_request(request, schema, served.settings)
    check_model(asked.model, served)
    form, generation = await run_in_threadpool(prepare, asked, served, request)
    return respond(request, served, generation, form)


def respond(request: HttpRequest, served: ServedModel, generation: Generation, form: Any) -> Response:
    """Put the request into the queue. The response streams where `form` gives bytes. Raises ApiError 429."""
    job = served.queue.submit(ServerJob(client_of(request), generation.run))
    path = request.url.path
    kind = SseResponse if hasattr(form, "end") else JsonResponse
    return kind(
        job, served.queue, form, write_timeout_s=served.settings.write_timeout_s,
        on_left=served.measured.cancelled, to_error=lambda error: error_body(error, path),
    )  # fmt: skip
