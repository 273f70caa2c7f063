"""A grammar by which a reply is a call of a tool, in the form that the model writes calls in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from offmoe.chat.tool_formats import ToolFormat

# As templates write JSON. With any whitespace a model may write blanks for ever.
_COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


def forced_grammar(
    form: ToolFormat, tools: Sequence[dict[str, Any]], token_id: Callable[[str], int | None], *, parallel: bool
) -> str | None:
    """A Lark grammar of llguidance whose texts are calls of `tools` in this form; None where the form has none.

    `token_id(text)`: the id of a mark that is one token of the vocabulary, else None.
    """
    if form.forced is None:
        return None
    rules = []
    for number, tool in enumerate(tools):
        function = tool["function"]
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        inner = {name: value for name, value in schema.items() if name not in {"$defs", "definitions"}}
        call = {
            "type": "object", "properties": {"name": {"const": function["name"]}, "arguments": inner},
            "required": ["name", "arguments"], "additionalProperties": False,
            **{name: value for name, value in schema.items() if name not in inner},
        }  # fmt: skip
        pieces = []
        for piece in form.forced:
            if piece == "{call}":
                pieces.append(f"%json {json.dumps({**call, **_COMPACT})}")
            elif piece == "{arguments}":
                pieces.append(f"%json {json.dumps({**schema, **_COMPACT})}")
            elif (mark := token_id(piece)) is not None:
                pieces.append(f"<[{mark}]>")
            else:
                pieces.append(json.dumps(piece.replace("{name}", function["name"]), ensure_ascii=False))
        rules.append(f"call{number}: {' '.join(pieces)}")
    calls = " | ".join(f"call{number}" for number in range(len(tools)))
    several = 'call ("\\n"? call)*' if parallel and form.closes else "call"
    return "\n".join([f"start: {several}", f"call: {calls}", *rules])
