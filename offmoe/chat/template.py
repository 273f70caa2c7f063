"""A conversation rendered by a model's chat template, in the form of messages that this template reads."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateError, meta

from offmoe.chat.control_tokens import REASONING_TAGS, unused_character
from offmoe.core.errors import UsageError
from offmoe.hf.door import PreTrainedTokenizerBase

Message = dict[str, Any]
# What apply_chat_template takes besides variables of the template.
_NOT_VARIABLES = ("tools", "documents", "chat_template")
_OURS = frozenset({"messages", "add_generation_prompt", "continue_final_message"})
_GIVEN = frozenset(
    {"bos_token", "eos_token", "pad_token", "unk_token", "raise_exception", "strftime_now", "range", "dict"}
)
# Switches of Qwen, GLM and others; of DeepSeek and Granite.
_THINKING = ("enable_thinking", "thinking")
# A tokenizer takes 190 bytes of RAM a character. A context of a million tokens is about half of this.
MOST_CHARACTERS = 8 << 20
# Below this many characters a text may be in the prompt by chance.
_SHORT = 40
_GENERATION_TAG = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
_PARSER = Environment(extensions=["jinja2.ext.loopcontrols"])
_DEFAULT = "default"
_PART_AS_TEXT = re.compile(r"""['"]type['"]: ?['"]text['"]""")


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], arguments: Mapping[str, Any], *,
    continue_final_message: bool = False,
) -> str:  # fmt: skip
    """The prompt after which the model's turn comes, or goes on from its begin in the last message.

    Templates differ in what they take for a message's content, a text or a list of parts, and some print nothing for
    the other form. So the forms are tried in turn, beginning with the one given, until the template takes one and
    everybody's words are in the prompt. Raises UsageError for what the template refuses in every form, with its first
    reason.
    """
    arguments = check_arguments(tokenizer, arguments)
    if continue_final_message:
        arguments["continue_final_message"] = True
    reasons: list[str] = []
    cause: Exception | None = None
    for attempt in _forms(messages):
        try:
            rendered = _apply(tokenizer, attempt, arguments)
        except Exception as error:  # noqa: BLE001 - a template is a program, and fails as programs do
            cause = cause if reasons else error
            reasons.append(f"refuses this conversation: {_reason(error)}")
            continue
        left_out = _left_out(tokenizer, attempt, arguments, check_length(rendered))
        if left_out is None:
            return rendered
        reasons.append(f"leaves out what the {left_out} says: this model has no place for it")
    try:
        raise UsageError(f"the model's chat template {reasons[0]}") from cause
    finally:
        del cause  # its traceback holds this call and all that the template made


def check_length(prompt: str) -> str:
    """`prompt`. Raises UsageError where it has more characters than any context."""
    if len(prompt) <= MOST_CHARACTERS:
        return prompt
    raise UsageError(
        f"the conversation is a prompt of {len(prompt)} characters, {MOST_CHARACTERS} is the most; shorten it, or give "
        "the model another chat template"
    )


def template_text(tokenizer: PreTrainedTokenizerBase, name: object = None) -> str:
    """The template that is used: of several the one called `name`, "default", or else the first."""
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return template if isinstance(template, str) else ""
    if name is not None and name not in template:
        raise UsageError(f"there is no chat template {name!r}; known: {', '.join(template)}")
    return str(template[name] if name is not None else template.get(_DEFAULT, next(iter(template.values()), "")))


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], arguments: Mapping[str, Any]) -> str:
    is_begun = "continue_final_message" in arguments
    rendered = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=not is_begun, **arguments
    )
    assert isinstance(rendered, str)
    return rendered


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"


def check_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for apply_chat_template. Raises UsageError for one that the template does not read, which would be
    without effect.
    """
    if tokenizer.chat_template is None and arguments:
        raise UsageError(f"the model has no chat template, so {next(iter(arguments))!r} is no argument of it")
    text = template_text(tokenizer, arguments.get("chat_template"))
    known = _variables(text) if arguments else set()
    for name in arguments:
        if name in _NOT_VARIABLES or name in known - _OURS:
            continue
        own = sorted(known - _OURS - _GIVEN)
        close = difflib.get_close_matches(str(name), own, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(own) or 'none'}"
        raise UsageError(f"the model's chat template has no argument {name!r}; {hint}")
    takes_name = isinstance(tokenizer.chat_template, dict)
    if takes_name and not ("tools" in arguments and "tool_use" in tokenizer.chat_template):
        return {**arguments, "chat_template": text}
    return dict(arguments)


def thinking_arguments(tokenizer: PreTrainedTokenizerBase, on: bool) -> dict[str, bool]:
    """The template's own switch for reasoning. Raises UsageError where it has none."""
    known = _variables(template_text(tokenizer))
    found = {name: on for name in _THINKING if name in known}
    if not found:
        others = ", ".join(sorted(name for name in known if "reason" in name or "think" in name)) or "none"
        raise UsageError(
            f"the model's chat template cannot switch thinking on or off; arguments like it: {others} (--template-arg)"
        )
    return found


def _variables(template: str) -> set[str]:
    """Names that a template takes from outside."""
    try:
        # transformers marks the model's turns with a tag of its own, which plain Jinja does not know.
        return meta.find_undeclared_variables(_PARSER.parse(_GENERATION_TAG.sub("", template)))
    except TemplateError:  # rendering says it better
        return set(re.findall(r"\w+", template))


def _forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Forms of the messages to try: as given; as parts; as text; parts for one role and text for the others; then with
    system for developer.
    """
    renamed = [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]
    roles = list(dict.fromkeys(message["role"] for message in messages))
    for given in [messages] if renamed == list(messages) else [messages, renamed]:
        yield list(given)
        yield [_as_parts(message) for message in given]
        yield [_as_text(message) for message in given]
        if len(roles) > 1:
            for role in roles:
                yield [(_as_parts if message["role"] == role else _as_text)(message) for message in given]
                yield [(_as_text if message["role"] == role else _as_parts)(message) for message in given]


def _as_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _as_text(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def words(message: Message) -> str:
    """The text of a message, of whatever form."""
    content = _as_text(message).get("content")
    return content if isinstance(content, str) else ""


def _left_out(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], arguments: Mapping[str, Any], rendered: str
) -> str | None:
    """The first role whose words are not in the prompt; None when all are.

    A short text may be in the prompt by chance, and a template may change a text: so there is a second rendering, with
    a mark for each text. Not counted: earlier reasoning, which templates cut off on purpose.
    """
    if any(isinstance(message.get("content"), list) for message in messages) and _PART_AS_TEXT.search(rendered):
        return str(messages[0]["role"])  # parts printed as they are
    in_doubt = {
        idx: message
        for idx, message in enumerate(messages)
        if any(text and (len(text) < _SHORT or text not in rendered) for text in _stripped(message))
        and not (message["role"] == "assistant" and any(close in words(message) for _, close in REASONING_TAGS))
    }
    mark = unused_character("".join(map(words, messages)))
    marked = [
        _as_said(message, f"{mark}{idx}{mark}") if idx in in_doubt else message for idx, message in enumerate(messages)
    ]
    try:
        shown = _apply(tokenizer, marked, arguments) if in_doubt else ""
    except Exception:  # noqa: BLE001 - it looks into the texts, so it does read them
        return None
    return next((str(message["role"]) for idx, message in in_doubt.items() if f"{mark}{idx}{mark}" not in shown), None)


def _stripped(message: Message) -> list[str]:
    content = message.get("content")
    return [part["text"].strip() for part in content] if isinstance(content, list) else [words(message).strip()]


def _as_said(message: Message, text: str) -> Message:
    """The message with another text, of the same form."""
    is_list = isinstance(message.get("content"), list)
    return {**message, "content": [{"type": "text", "text": text}] if is_list else text}
