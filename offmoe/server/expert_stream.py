"""The endpoint of the live picture of experts."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from offmoe.server.errors import ApiError
from offmoe.server.expert_watch import MOST_WATCHERS
from offmoe.server.serving import served_model
from offmoe.server.state import ServedModel

router = APIRouter()


@router.get("/offmoe/experts")
async def experts(request: HttpRequest) -> Response:
    """Server-sent events: `layers` has a text a layer, a letter an expert (see ExpertView)."""
    served: ServedModel = served_model(request)
    if served.watch.is_full:
        raise ApiError(429, f"{MOST_WATCHERS} watch already", kind="rate_limit_error", code="too_many_watchers")
    return StreamingResponse(served.watch.pictures(), media_type="text/event-stream")
