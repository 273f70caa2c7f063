"""The page at `/`: files of the package, read once. A request chooses among them by name and opens nothing."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from offmoe.server.errors import ApiError

_FOLDER = Path(__file__).parent / "web"
_KINDS = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml",
    ".js": "text/javascript; charset=utf-8",
}  # fmt: skip
# Nothing from outside, nothing inline, no frame around it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache", "X-Frame-Options": "DENY"}


def page_router() -> APIRouter:
    """Routes of the page and its files."""
    router = APIRouter()
    files = {path.name: (path.read_bytes(), _KINDS[path.suffix]) for path in _FOLDER.iterdir() if path.suffix in _KINDS}

    @router.get("/")
    async def index() -> Response:
        return _response(*files["index.html"])

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in files:
            raise ApiError(404, "there is no such file", code="not_found")
        return _response(*files[name])

    return router


def _response(content: bytes, kind: str) -> Response:
    return Response(content, media_type=kind, headers=_HEADERS)
