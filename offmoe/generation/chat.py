"""Messages to prompt ids, through the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from offmoe.base.errors import UsageError
from offmoe.generation.prompt import check_text

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Prompt ids of a conversation whose next turn is the model's.

    Without a template (base models) the turns are joined by newlines. Raises UsageError for malformed messages and for
    what the template itself refuses.
    """
    check_messages(messages)
    if not messages:
        raise UsageError("the conversation is empty; give at least one message")
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(message["content"] for message in messages) + "\n")["input_ids"])
    try:
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise UsageError(f"the model's chat template refuses this conversation: {error}") from None
    return list(encoded["input_ids"])


def check_messages(messages: Sequence[Message]) -> None:
    """Raise UsageError for what is no message, or has text that is none."""
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise UsageError(f"{message!r} is no message; use {{'role': one of {', '.join(ROLES)}, 'content': text}}")
        check_text(message["content"], "the message")
