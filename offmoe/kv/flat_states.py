"""Nested values with tensors as JSON and a table of tensors, and back: what files of kept prompts have.

Only tensors, numbers, truths, texts, None, lists, tuples, dictionaries, torch's types and devices occur. Anything else
is refused: nothing is ever unpickled.
"""

from __future__ import annotations

from typing import Any

import torch

_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)}


class FlatError(Exception):
    """A value that cannot be written, or text that is none of ours."""


def flatten(value: Any, tensors: dict[str, torch.Tensor], prefix: str) -> Any:
    """`value` for JSON; its tensors are added to `tensors`. Raises FlatError."""
    if isinstance(value, torch.Tensor):
        key = f"{prefix}{len(tensors)}"
        tensors[key] = value
        return {"t": key}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"v": value}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, dict):
        return {"d": [[flatten(key, tensors, prefix), flatten(item, tensors, prefix)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        items = [flatten(item, tensors, prefix) for item in value]
        return {"l" if isinstance(value, list) else "u": items}
    raise FlatError(f"a {type(value).__name__} in the KV cache cannot be written")


def unflatten(flat: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value that `flatten` was given. Raises FlatError."""
    if not isinstance(flat, dict) or len(flat) != 1:
        raise FlatError("not one kind")
    ((kind, value),) = flat.items()
    if kind == "t":
        if value not in tensors:
            raise FlatError("no such tensor")
        return tensors[value]
    if kind == "v" and (value is None or isinstance(value, (bool, int, float, str))):
        return value
    if kind == "dtype" and value in _DTYPES:
        return _DTYPES[value]
    if kind == "device" and value in {"cpu", "cuda"}:
        return torch.device(value)
    if kind == "d" and isinstance(value, list):
        return {unflatten(key, tensors): unflatten(item, tensors) for key, item in value}
    if kind in {"l", "u"} and isinstance(value, list):
        items = [unflatten(item, tensors) for item in value]
        return items if kind == "l" else tuple(items)
    raise FlatError("another kind")
