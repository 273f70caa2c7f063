"""The ASGI application: routes behind the guard, and errors in the form of each API."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from offmoe.core.errors import OffmoeError
from offmoe.server import expert_stream, status
from offmoe.server.anthropic import routes as anthropic_routes
from offmoe.server.errors import ApiError, as_api_error, error_body
from offmoe.server.guard import Guard
from offmoe.server.openai import routes as openai_routes
from offmoe.server.state import ServedModel
from offmoe.server.web_page import page_router


def make_app(served: ServedModel) -> ASGIApp:
    """The application for one model. Pages that FastAPI makes of its routes are off: they load scripts from outside."""
    app = FastAPI(title="offmoe", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.served = served
    routers = [status.router, openai_routes.router, anthropic_routes.router, expert_stream.router]
    if served.settings.web_page:
        routers.append(page_router())
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(OffmoeError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_error)
    paths = frozenset(route.path for router in routers for route in router.routes if isinstance(route, APIRoute))
    return Guard(app, served.settings, served.measured.answered, paths)


async def _answer_error(request: HttpRequest, error: Exception) -> Response:
    return _response(as_api_error(error), request)


async def _answer_http(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {404: "is no endpoint", 405: "has other methods than this"}.get(error.status_code, "failed")
    message = f"{request.method} {request.url.path[:200]} {told}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return _response(ApiError(error.status_code, message, code=code, headers=dict(error.headers or {})), request)


def _response(error: ApiError, request: HttpRequest) -> Response:
    return JSONResponse(error_body(error, request.url.path), status_code=error.status, headers=error.headers)
