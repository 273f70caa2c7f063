"""A request's JSON, read within limits and checked against a model of pydantic's. No field is ignored in silence."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, ValidationError

from offmoe.server.errors import ApiError, invalid
from offmoe.server.settings import ServerSettings

Model = TypeVar("Model", bound="Fields")
_MOST_NUMBER_DIGITS = 40
_SHOWN_LETTERS = 80
# Pydantic's names for the forms of a field: list[...], literal[...], constrained-str, str, a class.
_FORM_NAME = re.compile(r".*[\[].*|.*-str|.*-int|str|int|float|bool|[A-Z][A-Za-z]+")


class Fields(BaseModel):
    """Base of all requests: types are strict, a field that is not named is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ModelRequest(Fields):
    """A request that may name its model."""

    model: str | None = None


async def read_request(request: HttpRequest, model: type[Model], settings: ServerSettings) -> Model:
    """The body as a `model`. Raises ApiError for what is no JSON, too deep, or of the wrong form."""
    return parse_body(await request.body(), model, settings)


def parse_body(raw: bytes, model: type[Model], settings: ServerSettings) -> Model:
    """`raw` as a `model`; null counts as not given. Raises ApiError naming the field."""
    value = load_json(raw, max_depth=settings.max_depth)
    if not isinstance(value, dict):
        raise invalid("the body is no JSON object")
    return validated({name: item for name, item in value.items() if item is not None}, model)


def validated(value: dict[str, Any], model: type[Model]) -> Model:
    """`value` as a `model`. Raises ApiError naming the field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _explained(error) from None


def load_json(raw: bytes, *, max_depth: int) -> Any:
    """The value of a JSON text. Raises ApiError."""
    try:
        value = json.loads(raw, parse_constant=_refuse_constant, parse_int=_whole, parse_float=_real)
    except RecursionError:
        raise invalid(f"the body is JSON nested more than {max_depth} deep") from None
    except UnicodeDecodeError as error:
        raise invalid(f"the body is no UTF-8 text: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise invalid(f"the body is no JSON: {error}") from None
    check_depth(value, max_depth)
    return value


def check_depth(value: Any, max_depth: int) -> None:
    """Raise ApiError for lists and objects nested deeper than `max_depth`."""
    level = [value]
    for _ in range(max_depth + 1):
        level = [
            inner for item in level if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]  # fmt: skip
        if not level:
            return
    raise invalid(f"the body is JSON nested more than {max_depth} deep")


def _whole(text: str) -> int:
    if len(text) > _MOST_NUMBER_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    number = float(text)
    if number in {float("inf"), float("-inf")}:
        raise ValueError("a number that is too large")
    return number


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _explained(error: ValidationError) -> ApiError:
    """The first mistake, with the path of its field."""
    found = error.errors(include_url=False, include_context=False)
    # Of a field that may have several forms there is an error for each: the deepest is of the form that was meant.
    first = max((each for each in found if each["loc"][:1] == found[0]["loc"][:1]), key=lambda each: len(each["loc"]))
    param = field_path(first["loc"])
    if first["type"] == "extra_forbidden":
        return invalid(f"Unknown parameter: '{param}'.", param, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    shown = repr(first["input"])
    shown = shown if len(shown) <= _SHOWN_LETTERS else f"{shown[:_SHOWN_LETTERS]}..."
    return invalid(f"Invalid value for '{param}': {first['msg']}; it is {shown}", param, "invalid_value")


def field_path(parts: tuple[int | str, ...]) -> str:
    """`messages[0].content` for ("messages", 0, "content"), without pydantic's names of forms."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not _FORM_NAME.fullmatch(part):
            path += f".{part}" if path else part
    return path
