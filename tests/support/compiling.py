"""Compiled steps in tests: without inductor, at once or in the background."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from offmoe.decode import compiled
from offmoe.decode.compiled import DecodeCompiler


def as_captured(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """A lowering that runs graphs as they were captured."""
    return graph.forward


def lower_with(monkeypatch: pytest.MonkeyPatch, lower: Callable[..., Any]) -> None:
    """Graphs are lowered by `lower` from now on."""
    monkeypatch.setattr(compiled, "DecodeCompiler", functools.partial(DecodeCompiler, lower=lower))


def in_background(monkeypatch: pytest.MonkeyPatch, lower: Callable[..., Any] = as_captured) -> None:
    """`compile="on"` compiles as "auto" does on a GPU, by Dynamo itself, from the first token on."""
    monkeypatch.setattr(compiled, "TOKENS_BEFORE", 0)
    monkeypatch.setattr(
        compiled, "DecodeCompiler",
        lambda model, length, **options: DecodeCompiler(
            model, length, **{**options, "background": True, "lower": lower}
        ),
    )  # fmt: skip
