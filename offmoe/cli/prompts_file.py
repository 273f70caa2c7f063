"""Prompts from a file: one a line, or the whole text."""

from __future__ import annotations

import json
from pathlib import Path

from offmoe.core.errors import UsageError
from offmoe.core.files import read_text_bounded


def read_prompts(path: Path, *, whole: bool) -> list[str | list[int]]:
    """The prompts in `path`, at least one. Empty lines are left out; with `whole` the text is one prompt.

    A line that is a JSON string, or a JSON list of token ids, stands for what it holds. Raises UsageError.
    """
    text = read_text_bounded(path, "--prompts")
    prompts = [_prompt(line) for line in text.splitlines() if line.strip()]
    if whole and prompts:
        prompts = [text]
    if not prompts:
        raise UsageError(f"--prompts {path} is empty; write one prompt a line")
    return prompts


def _prompt(line: str) -> str | list[int]:
    if line.lstrip()[:1] in {'"', "["}:
        try:
            value = json.loads(line)
        except ValueError:
            return line
        if isinstance(value, str) or (
            isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value)
        ):
            return value
    return line
