"""From the flags of `offmoe chat` to a chat."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offmoe.cli.options import read_stdin, split_engine_options
from offmoe.cli.session import check_request, open_engine
from offmoe.core.errors import UsageError

if TYPE_CHECKING:
    from offmoe.engine.conversation import Conversation
    from offmoe.engine.engine import Engine

DASH, DEMO = "-", "demo"


@dataclass(frozen=True)
class TemplateOptions:
    """Settings that turn messages into a prompt. `thinking` is "on", "off" or None for the template's own default."""

    arguments: dict[str, Any]
    thinking: str | None
    allow_control_tokens: bool

    def begin(self, engine: Engine, *, system: str | None) -> Conversation:
        """A conversation with these options. Raises UsageError for what the model's template does not have."""
        from offmoe.chat.template import thinking_arguments

        arguments = dict(self.arguments)
        if self.thinking is not None and engine.tokenizer is not None:
            arguments |= thinking_arguments(engine.tokenizer, self.thinking == "on")
        return engine.conversation(
            system=system, chat_template_kwargs=arguments, allow_control_tokens=self.allow_control_tokens
        )


def start_run(model: str, words: tuple[str, ...], options: dict[str, Any], template: TemplateOptions) -> None:
    """`run`: one question and its answer, or a chat without `words`."""
    named = None if model == DEMO and not Path(DEMO).exists() else model
    if not words:
        start_chat(named, None, options, template)
        return
    start_chat(named, None, options, template, question=" ".join(read_stdin() if w == DASH else w for w in words))


def start_chat(
    model: str | None, dash: str | None, options: dict[str, Any], template: TemplateOptions, *,
    question: str | None = None,
) -> None:  # fmt: skip
    """Load and talk; with a `question`, answer it and end. `model` may be the dash. Raises UsageError before anything
    heavy is imported.
    """
    if model == DASH:
        model, dash = dash, DASH
    if dash not in {None, DASH}:
        raise UsageError(f'{dash!r} is one argument too many; use MODEL, and "-" to read a message from standard input')
    engine_given, others = split_engine_options(options)
    style = {
        "color": not others.pop("no_color") and not os.environ.get("NO_COLOR"), "markdown": not others.pop("plain"),
        "as_json": others.pop("as_json"), "keep_history": not others.pop("no_history"),
    }  # fmt: skip
    system = others.pop("system", None)
    check_request(model, engine_given, quiet=style["as_json"])
    message = read_stdin() if dash else question
    if message is not None and not message.strip():
        raise UsageError("standard input is empty; give a message" if dash else "the question is empty; give one")
    with open_engine(model, engine_given) as engine:
        from offmoe.cli.chat.loop import ChatStyle, run_chat

        conversation = template.begin(engine, system=system)
        run_chat(engine, conversation, options=others, style=ChatStyle(**style), message=message)
