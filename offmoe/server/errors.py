"""Errors as OpenAI's API writes them: an object with message, type, param and code."""

from __future__ import annotations

from typing import Any

from offmoe.core.errors import (
    BudgetError,
    ContextLengthError,
    EngineBusyError,
    EngineClosedError,
    OffmoeError,
    UsageError,
)

INVALID = "invalid_request_error"
_INTERNAL = "the server failed on this request; its log says more"
# What a message says after this names files and settings of the host; a client is told the rest.
_MOST_LETTERS = 600


class ApiError(Exception):
    """An answer that is an error. `param`: the path of the field in the request; `headers`: of the response."""

    def __init__(
        self, status: int, message: str, *, kind: str = INVALID, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A mistake of the request."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, instead: str) -> ApiError:
    """A parameter of the API that this server does not have."""
    return ApiError(400, f"{param} is not supported: {instead}", param=param, code="unsupported_parameter")


def as_api_error(error: BaseException) -> ApiError:
    """The answer for an error of the engine. A user's mistake is told in full; what happened inside is not."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return invalid(_cut(error), code="context_length_exceeded")
    if isinstance(error, UsageError):
        message = _cut(error)
        first = message.split(maxsplit=1)[0].rstrip(":") if message else ""
        return invalid(message, param=first if first.isidentifier() and first in _PARAMS else None)
    for kind, answer in _UNAVAILABLE.items():
        if isinstance(error, kind):
            code, message = answer
            return ApiError(503, message, kind="server_error", code=code, headers={"Retry-After": "5"})
    code = "engine_error" if isinstance(error, OffmoeError) else "internal_error"
    return ApiError(500, _INTERNAL, kind="server_error", code=code)


_UNAVAILABLE: dict[type[OffmoeError], tuple[str, str]] = {
    EngineClosedError: ("shutting_down", "the server is shutting down"),
    EngineBusyError: ("engine_busy", "the program that serves the model uses it; try again"),
    BudgetError: ("no_memory", "memory ran out on this request; try a shorter one"),
}


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The error in the form of the API that `path` belongs to."""
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": anthropic_kind(error), "message": error.message}}
    return error.body()


def anthropic_kind(error: ApiError) -> str:
    """Anthropic's name for a kind of error."""
    by_status = {
        401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
        429: "rate_limit_error", 503: "overloaded_error",
    }  # fmt: skip
    return by_status.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")


_PARAMS = frozenset({
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "stop", "stop_token_ids", "logprobs", "logit_bias", "json_schema", "regex", "grammar", "max_new_tokens",
})  # fmt: skip


def _cut(error: OffmoeError) -> str:
    text = str(error)
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}..."
