"""Messages to prompt ids, through the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from offmoe.chat.control_tokens import HiddenTokens
from offmoe.chat.render_time import limited_time
from offmoe.chat.template import Message, check_arguments, check_length, render, words
from offmoe.core.errors import UsageError
from offmoe.hf.door import PreTrainedTokenizerBase
from offmoe.hf.tokens.tokenizing import check_rows, check_text, tokenizing

ROLES = ("system", "developer", "user", "assistant", "tool")
_FORM = f"use {{'role': one of {', '.join(ROLES)}, 'content': text, or a list of {{'type': 'text', 'text': ...}}}}"


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, vocab_size: int | None = None,
    arguments: Mapping[str, Any] | None = None, allow_control_tokens: bool = False,
    continue_final_message: bool = False,
) -> list[int]:  # fmt: skip
    """Prompt ids of a conversation whose next turn is the model's.

    `arguments` are variables of the template, such as enable_thinking. Control tokens that stand in a message are
    encoded as the text that they are, so that nobody's words can end a turn or begin another; with
    `allow_control_tokens` they are structure, as in transformers. Without a template (base models) the turns are joined
    by newlines. `continue_final_message`: the last message is the model's, and is left open. Raises UsageError for
    malformed messages, for what the template itself refuses, for a template that does not end, for more than
    MOST_CHARACTERS, and for a token that is beyond `vocab_size`.
    """
    check_messages(messages)
    if not messages:
        raise UsageError("the conversation is empty; give at least one message")
    if continue_final_message and (messages[-1]["role"] != "assistant" or not words(messages[-1]).strip()):
        raise UsageError("continue_final_message: the last message must be the assistant's, and have a text")
    hidden = HiddenTokens(tokenizer)
    said = [dict(message) for message in messages] if allow_control_tokens else hidden.hide(messages)
    is_base = tokenizer.chat_template is None
    if is_base:
        check_arguments(tokenizer, arguments or {})
        text = check_length("\n".join(words(message) for message in said) + ("" if continue_final_message else "\n"))
    else:
        with limited_time():
            text = render(tokenizer, said, arguments or {}, continue_final_message=continue_final_message)
    with tokenizing("the model"):
        ids = hidden.encode(text, add_special_tokens=is_base)
    return ids if vocab_size is None else check_rows(ids, tokenizer, vocab_size=vocab_size)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise UsageError for what is no message, or has text that is none."""
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UsageError(f"{message!r} is no message; {_FORM}")
        content = message.get("content")
        calls_tools = message["role"] == "assistant" and bool(message.get("tool_calls"))
        if isinstance(content, list) and content:
            for part in content:
                _check_part(part, message)
        elif not isinstance(content, str) and not (content is None and calls_tools):
            raise UsageError(f"{message!r} is no message; {_FORM}")
        check_text(words(message), "the message")


def _check_part(part: object, message: Message) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise UsageError(f"a part of the message is of type {kind!r}; offmoe reads text only")
    if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
        raise UsageError(f"{message!r} is no message; {_FORM}")
