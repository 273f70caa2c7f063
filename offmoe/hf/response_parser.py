"""transformers' parser of replies, where a tokenizer brings a template of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def make_response_parser(
    tokenizer: PreTrainedTokenizerBase, prompt: str, tools: Sequence[dict[str, Any]]
) -> Any | None:
    """A ResponseParser for the reply to `prompt`; None without a template, or in a transformers that has no parser."""
    template = getattr(tokenizer, "response_template", None)
    if template is None:
        return None
    try:
        from transformers.utils.chat_parsing import ResponseParser
    except ImportError:
        return None
    return ResponseParser(template, prefix=prompt, tools=list(tools))
