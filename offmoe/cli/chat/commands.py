"""Commands that begin with a slash in `offmoe chat`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offmoe.cli.say import say
from offmoe.cli.session import peak_line
from offmoe.core.errors import UsageError
from offmoe.core.files import read_text_bounded
from offmoe.core.folders import expand
from offmoe.core.units import format_percent, format_seconds, format_traffic

if TYPE_CHECKING:
    from offmoe.engine.conversation import Conversation
    from offmoe.engine.engine import Engine

_WHOLE = ("max_new_tokens", "top_k", "seed")
_FRACTIONS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
SETTINGS = (*_WHOLE, *_FRACTIONS)
_UNSET = ("default", "auto")
_SHOWN_LETTERS = 60
MAX_FILE_BYTES = 4 << 20  # /file's; a context of a million tokens


@dataclass(frozen=True)
class _Command:
    """`argument`: what follows the name, for /help; "" where nothing may, in brackets where it may be left out."""

    argument: str
    does: str
    run: Callable[[SlashCommands, str], None]


class Leave(Exception):  # noqa: N818 - no error
    """/exit."""


class SlashCommands:
    """Runs `/name argument` lines on a conversation. `options` are those of every reply; /set changes them."""

    def __init__(
        self, engine: Engine, conversation: Conversation, options: dict[str, Any], *, retry: Callable[[], None],
        answer: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._engine, self._conversation, self.options = engine, conversation, options
        self._retry, self._answer = retry, answer
        self.draft = ""
        """The text at the next prompt, for the user to change."""

    def run(self, line: str) -> None:
        """Raises UsageError for what cannot be done, and Leave."""
        name, _, argument = line.strip().partition(" ")
        name, argument = name.lower(), argument.strip()
        command = _COMMANDS.get(_ALIASES.get(name, name))
        if command is None:
            raise UsageError(_unknown("command", name, list(COMMAND_NAMES)) + "; a space before / sends it as text")
        if argument and not command.argument:
            raise UsageError(f"{name} takes nothing, not {argument!r}")
        if not argument and command.argument and not command.argument.startswith("["):
            raise UsageError(f"{name} needs {command.argument}: {name} {command.argument}")
        command.run(self, argument)

    def _help(self, argument: str) -> None:
        usages = [(f"{name} {command.argument}".strip(), command.does) for name, command in _COMMANDS.items()]
        width = max(len(usage) for usage, _ in usages)
        for usage, does in usages:
            say(f"{usage:<{width}}  {does}", indent="    ")
        say("Alt-Enter, or a backslash at the end of a line, begins a new one; so does a paste of several lines.")

    def _reset(self, argument: str) -> None:
        self._conversation.reset()
        say("forgotten" + ("; the system message stays" if self._conversation.system else ""))

    def _undo(self, argument: str) -> None:
        question = self._conversation.undo()
        say(f"taken back: {_shortened(question)}")

    def _edit(self, argument: str) -> None:
        """Take the last exchange back; answer `argument`, or let the user change the message at the prompt."""
        question = self._conversation.undo()
        if argument:
            self._answer(argument)
        else:
            self.draft = question

    def _file(self, argument: str) -> None:
        path, question = _path_and_rest(argument)
        text = read_text_bounded(path, "/file", MAX_FILE_BYTES)
        self._answer(f"{question}\n\n{path.name}:\n\n{text}" if question else f"{path.name}:\n\n{text}")

    def _think(self, argument: str) -> None:
        from offmoe.chat.template import thinking_arguments

        if argument not in {"on", "off"}:
            raise UsageError(f"/think is {argument!r}; use on or off")
        assert self._engine.tokenizer is not None, "a conversation has a tokenizer"
        self._conversation.set_template(**thinking_arguments(self._engine.tokenizer, argument == "on"))
        say(f"thinking {argument}")

    def _system(self, argument: str) -> None:
        if argument:
            self._conversation.system = None if argument == "off" else argument
        say(f"system: {self._conversation.system or 'none'}")

    def _save(self, argument: str) -> None:
        self._conversation.save(_path(argument))
        say(f"saved {len(self._conversation.messages)} messages")

    def _load(self, argument: str) -> None:
        self._conversation.load(_path(argument))
        say(f"loaded {len(self._conversation.messages)} messages, {self._conversation.num_tokens()} tokens")

    def _stats(self, argument: str) -> None:
        totals = self._engine.stats()
        lookups = totals.hits + totals.late_hits + totals.misses
        prefetch = totals.prefetch
        rows = [
            ("experts", f"{totals.experts_cached} of {totals.experts_total} have a slot"),
            ("hits", f"{format_percent(totals.hit_rate)} of {lookups} look-ups"),
            (
                "from disk",
                f"{format_traffic(totals.disk_bytes)}, waited {format_seconds(totals.disk_stall_ns / 1e9)}",
            ),
            ("prompts", f"{totals.prefilled_tokens} tokens read, {totals.reused_tokens} reused"),
            ("context", f"{self._conversation.num_tokens()} of {self._engine.context_length} tokens"),
            ("prefetch", prefetch if isinstance(prefetch, str) else str(prefetch.get("mode", "on"))),
        ]
        for name, value in rows:
            say(f"{name:<10} {value}")
        say(peak_line(self._engine))

    def _set(self, argument: str) -> None:
        name, _, text = argument.replace("=", " ").partition(" ")
        text = text.strip()
        if not name:
            for known in SETTINGS:
                say(f"{known:<18} {self._shown(known)}")
            return
        if name not in SETTINGS:
            raise UsageError(_unknown("setting", name, list(SETTINGS)))
        if text:
            self._change(name, text)
        say(f"{name} {self._shown(name)}")

    def _change(self, name: str, text: str) -> None:
        """Raises UsageError, and then nothing is changed."""
        changed = {known: value for known, value in self.options.items() if known != name}
        if text.lower() not in _UNSET:
            changed[name] = _number(name, text)
        self._sampling(changed)
        self.options.clear()
        self.options.update(changed)

    def _shown(self, name: str) -> str:
        if name == "max_new_tokens":
            return str(self.options.get(name, "as many as the context has room for"))
        value = getattr(self._sampling(self.options), name)
        return ("random" if value is None else str(value)) + ("" if name in self.options else " (the model's default)")

    def _sampling(self, options: dict[str, Any]) -> Any:
        from offmoe.sampling.params import SAMPLING_NAMES
        from offmoe.sampling.sampler import resolve_sampling

        defaults = self._engine.model.generation_config
        assert defaults is not None
        return resolve_sampling(defaults, **{k: v for k, v in options.items() if k in SAMPLING_NAMES})

    def _again(self, argument: str) -> None:
        self._retry()

    def _exit(self, argument: str) -> None:
        raise Leave


def _number(name: str, text: str) -> int | float:
    try:
        number = int(text) if name in _WHOLE else float(text)
    except ValueError:
        kind = "a whole number" if name in _WHOLE else "a number"
        raise UsageError(f"{name} is {text!r}; use {kind}, or {_UNSET[0]!r}") from None
    if name == "max_new_tokens" and number < 1:
        raise UsageError(f"max_new_tokens is {text}; use a whole number of at least 1")
    return number


def _unknown(what: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ";"
    return f"unknown {what} {name!r}{hint} known: {', '.join(known)}"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_LETTERS else f"{line[:_SHOWN_LETTERS]}..."


def _path_and_rest(argument: str) -> tuple[Path, str]:
    """A path, in quotes if it has blanks, and what follows it."""
    if argument[0] in "\"'" and argument[0] in argument[1:]:
        path, _, rest = argument[1:].partition(argument[0])
    else:
        path, _, rest = argument.partition(" ")
    return _path(path), rest.strip()


def _path(text: str) -> Path:
    return expand(text.strip("\"'"))


_COMMANDS = {
    "/help": _Command("", "these lines", SlashCommands._help),
    "/reset": _Command("", "forget what was said, but not the system message", SlashCommands._reset),
    "/retry": _Command("", "another reply to your last message", SlashCommands._again),
    "/undo": _Command("", "take your last message and its reply back", SlashCommands._undo),
    "/edit": _Command("[TEXT]", "change your last message, or put TEXT in its place", SlashCommands._edit),
    "/file": _Command("FILE [QUESTION]", "send a text file, with a question about it", SlashCommands._file),
    "/think": _Command("on|off", "whether the model reasons before it answers, where it can", SlashCommands._think),
    "/system": _Command("[TEXT]", "show or set the system message; 'off' takes it away", SlashCommands._system),
    "/set": _Command("[NAME VALUE]", "show or change how replies are chosen: /set temperature 0.7", SlashCommands._set),
    "/stats": _Command("", "what was read, kept and waited for since the model was loaded", SlashCommands._stats),
    "/save": _Command("FILE", "write the conversation as JSON", SlashCommands._save),
    "/load": _Command("FILE", "go on with a saved conversation", SlashCommands._load),
    "/exit": _Command("", "leave; so do /bye, /quit, Ctrl-D, and Ctrl-C twice", SlashCommands._exit),
}
_ALIASES = {"/quit": "/exit", "/bye": "/exit", "/clear": "/reset", "/regen": "/retry", "/?": "/help"}
COMMAND_NAMES = tuple(_COMMANDS)
