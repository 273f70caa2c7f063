"""`offmoe chat`: read a message, stream the reply, one line of statistics."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offmoe.cli.chat.commands import COMMAND_NAMES, Leave, SlashCommands
from offmoe.cli.chat.input import make_reader
from offmoe.cli.chat.interrupt import StopRequest
from offmoe.cli.options import print_json, verbosity
from offmoe.cli.say import say
from offmoe.cli.session import PromptProgress, say_figures
from offmoe.core.errors import ContextLengthError, EngineBusyError, EngineClosedError, OffmoeError, UsageError
from offmoe.report.reply_view import is_smart_terminal, make_view, no_echo

if TYPE_CHECKING:
    from offmoe.engine.conversation import Conversation
    from offmoe.engine.engine import Engine
    from offmoe.engine.stream import Chunk, Stream

_NO_TEMPLATE = (
    "This model has no chat template: the prompt is all messages, each on a line of its own, and the model goes on "
    "from there. A base model continues text; it may not answer."
)
# Of the context, what may be taken before the user is told.
_NEARLY_FULL = 0.9


@dataclass(frozen=True, kw_only=True)
class ChatStyle:
    """Looks of a chat. `markdown` False: text as the model writes it."""

    markdown: bool = True
    color: bool = True
    as_json: bool = False
    keep_history: bool = True


def run_chat(
    engine: Engine, conversation: Conversation, *, options: dict[str, Any], style: ChatStyle, message: str | None = None
) -> None:
    """One `message`, or until end of input or /exit. Ctrl-C stops the reply and keeps the conversation.

    In a pipe a message that cannot be answered gets an error in the place of a reply, and the next one is read. Raises
    UsageError at the end of such a run.
    """
    chat = _Chat(engine, conversation, options, style, interactive=message is None and sys.stdin.isatty())
    if chat.template_is_missing:
        say(_NO_TEMPLATE)
    if message is not None:
        chat.answer(message)
        return
    if chat.interactive:
        say("/help lists commands; Ctrl-C stops a reply; /exit leaves.")
    chat.run()


class _Chat:
    """A person, or a pipe, and a conversation."""

    def __init__(
        self, engine: Engine, conversation: Conversation, options: dict[str, Any], style: ChatStyle, *,
        interactive: bool,
    ) -> None:  # fmt: skip
        self._engine, self._style, self.interactive = engine, style, interactive
        self._conversation = conversation
        self._commands = SlashCommands(
            engine, self._conversation, options, retry=self._retry, answer=self.answer
        )  # fmt: skip
        self._num_taken = self._num_failed = 0
        self._num_retries = 0

    @property
    def template_is_missing(self) -> bool:
        """Prompts are built without the publisher's template."""
        return self._engine.tokenizer is not None and self._engine.tokenizer.chat_template is None

    def run(self) -> None:
        """Message after message."""
        reader = make_reader(
            commands=COMMAND_NAMES, color=self._style.color, keep_history=self._style.keep_history
        )  # fmt: skip
        asked_to_leave = False
        while True:
            line = None
            try:
                draft, self._commands.draft = self._commands.draft, ""
                line = reader.read(draft)
                asked_to_leave = False
                if line is None:
                    break
                self._take(line)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                if asked_to_leave:
                    return
                asked_to_leave = True
                say("Ctrl-C again, Ctrl-D or /exit leaves.")
            except Leave:
                break
            except (OffmoeError, OSError) as error:
                if isinstance(error, (EngineBusyError, EngineClosedError)):
                    raise
                if not self.interactive and (line is None or isinstance(error, OSError)):
                    raise  # nothing more can be read, or written
                self._fail(error)
        if self._num_failed and not self.interactive:
            raise UsageError(f"{self._num_failed} of {self._num_taken} messages were not answered")

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        self._num_taken += 1
        if line.startswith("/"):
            self._commands.run(line)
        else:
            self.answer(line)

    def _fail(self, error: Exception) -> None:
        """Say why there is no reply: to a person, or for the line of a pipe."""
        self._num_failed += 1
        reason = " ".join(str(error).split())
        if self.interactive:
            hint = "; /reset begins anew, /save FILE keeps this" if isinstance(error, ContextLengthError) else ""
            say(f"error: {reason}{hint}")
        elif self._style.as_json:
            print_json({"error": reason, "message": self._num_taken})
        else:
            say(f"error: message {self._num_taken}: {reason}")

    def answer(self, text: str) -> None:
        """Stream the reply to `text`."""
        self._num_retries = 0
        self._show(lambda **more: self._conversation.stream(text, **self._options(), **more))

    def _retry(self) -> None:
        """With a seed, another one each time."""
        self._num_retries += 1
        options = self._options()
        if options.get("seed") is not None:
            options["seed"] += self._num_retries
        self._show(lambda **more: self._conversation.retry(**options, **more))

    def _options(self) -> dict[str, Any]:
        return {"max_new_tokens": self._engine.context_length, **self._commands.options}

    def _show(self, begin: Callable[..., Stream]) -> None:
        last, stopped = None, False
        texts: dict[bool, list[str]] = {False: [], True: []}
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            progress = stack.enter_context(PromptProgress(self._engine, quiet=verbosity() < 0))
            if self.interactive and is_smart_terminal(sys.stdout):
                stack.enter_context(no_echo())

            def on_prefill(done: int, total: int) -> None:
                progress.show(done, total)
                stop.check()

            chunks = begin(on_prefill=on_prefill)
            view = None if self._style.as_json else make_view(markdown=self._style.markdown, color=self._style.color)
            try:
                for last in chunks:
                    progress.close()
                    texts[last.reasoning].append(last.text)
                    if view is not None:
                        view.add(last.text, reasoning=last.reasoning)
                    stop.check()
            except KeyboardInterrupt:
                stopped = True
            finally:
                chunks.close()
                progress.close()
                if view is not None:
                    view.end()
        self._conclude(last, texts, stopped=stopped)

    def _conclude(self, last: Chunk | None, texts: dict[bool, list[str]], *, stopped: bool) -> None:
        """Print the lines after a reply."""
        stats = last.stats if last is not None else None
        if self._style.as_json:
            reason = last.finish_reason if last is not None else None
            numbers = {} if stats is None else stats.as_dict()
            print_json({
                "text": "".join(texts[False]), "reasoning": "".join(texts[True]),
                "finish_reason": reason or "stopped", **numbers,
            })  # fmt: skip
        elif stopped or stats is None:
            forgotten = "" if "".join(texts[False]).strip() else "; nothing was answered: /retry asks it again"
            say(f"[stopped]{forgotten}", dim=True)
        else:
            say_figures(self._engine, stats, f" | {self._context_meter()}")
        if stopped and not self.interactive:
            raise KeyboardInterrupt
        if verbosity() < 0:
            return
        is_full = stats is not None and stats.prompt_tokens + stats.new_tokens >= self._engine.context_length
        if last is not None and last.finish_reason == "length" and not is_full:
            most = self._commands.options["max_new_tokens"]
            how = "/set max_new_tokens N" if self.interactive else "--max-new-tokens N"
            say(f"[cut at {most} tokens: {how} for longer replies]", dim=True)
        if last is not None and last.finish_reason == "length" and is_full:
            say("[the context is full: /reset begins anew, /save FILE keeps this]", dim=True)
        elif self._used() > _NEARLY_FULL * self._engine.context_length:
            say("[the context is nearly full: --context-length N makes more room at the next start]", dim=True)

    def _used(self) -> int:
        return self._conversation.num_tokens()

    def _context_meter(self) -> str:
        used, most = self._used(), self._engine.context_length
        return f"context {used}/{most} ({100 * used // most}%)"
