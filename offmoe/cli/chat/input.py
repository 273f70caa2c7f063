"""Sources of a chat's lines: an editor with a history on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from offmoe.cli.say import say
from offmoe.core.errors import UsageError
from offmoe.core.folders import home_folder
from offmoe.report.reply_view import is_smart_terminal

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

PROMPT, CONTINUED = "> ", ". "
_TURN_S = 0.1
# Of the history file, what is kept when it has grown beyond the first number.
_LARGEST_HISTORY, _KEPT_HISTORY = 1 << 20, 1 << 19


class Reader(Protocol):
    """`read` gives the next message; None at the end of input. KeyboardInterrupt: Ctrl-C on an empty line."""

    def read(self, draft: str = "") -> str | None:
        """Waits for it. `draft`: text to begin with, which the user may change."""


def make_reader(*, commands: Sequence[str], color: bool, keep_history: bool) -> Reader:
    """For standard input as it is. `commands` are completed."""
    if sys.stdin.isatty() and is_smart_terminal(sys.stderr):
        return EditorReader(commands=commands, color=color, keep_history=keep_history)
    return LineReader(prompt=PROMPT if sys.stdin.isatty() else "")


def continues(line: str) -> bool:
    """A line that ends in a backslash (but not in an escaped one) goes on with the next."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


class LineReader:
    """Lines of standard input, with a prompt on standard error when a person types them."""

    def __init__(self, *, prompt: str) -> None:
        self._prompt = prompt

    def read(self, draft: str = "") -> str | None:
        """See Reader; a draft is shown, to be typed anew. Raises UsageError for bytes that are no text."""
        if draft and self._prompt:
            say(f"your last message, to type anew: {draft}")
        lines: list[str] = []
        while not lines or continues(lines[-1]):
            line = self._read_line(self._prompt and (CONTINUED if lines else self._prompt))
            if line is None:
                break
            lines.append(line)
        if not lines:
            return None
        return "\n".join(line[:-1] if continues(line) else line for line in lines)

    def _read_line(self, prompt: str) -> str | None:
        click.echo(prompt, nl=False, err=True)
        if self._prompt:
            _await_keys()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UsageError(f"the input is no {error.encoding} text ({error.reason}); convert it first") from None
        if line:
            return line.rstrip("\r\n")
        if self._prompt:
            click.echo(err=True)
        return None


def _await_keys() -> None:
    """Until there is something to read. In turns: a Ctrl-C right before a read that blocks is seen only after it."""
    while sys.platform != "win32" and not select.select([sys.stdin], [], [], _TURN_S)[0]:
        pass


class EditorReader:
    """prompt_toolkit: arrow keys, history, completion of commands, several lines by Alt-Enter, backslash or paste."""

    def __init__(self, *, commands: Sequence[str], color: bool, keep_history: bool) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.output import ColorDepth, create_output

        words = WordCompleter(list(commands), sentence=True)
        self._output = create_output(stdout=sys.stdout if is_smart_terminal(sys.stdout) else sys.stderr)
        self._session: PromptSession[str] = PromptSession(
            history=open_history(history_path()) if keep_history else None, key_bindings=_bindings(), multiline=True,
            prompt_continuation=CONTINUED, completer=words, complete_while_typing=False,
            color_depth=None if color else ColorDepth.MONOCHROME, output=self._output,
        )  # fmt: skip

    def read(self, draft: str = "") -> str | None:
        """See Reader."""
        try:
            return self._session.prompt(PROMPT, default=draft)
        except EOFError:
            return None
        except SystemExit:  # SIGTERM: the editor gives back the terminal's mode, and not this
            self._output.disable_bracketed_paste()
            self._output.write_raw("\n")
            self._output.flush()
            raise


def _bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # what was typed before the prompt came
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and continues(buffer.text):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

    return keys


def history_path() -> Path:
    """Beside what other programs of the user remember."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home_folder() / "AppData/Local")
    elif sys.platform == "darwin":
        base = home_folder() / "Library/Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or home_folder() / ".local/state")
    return base / "offmoe" / "chat_history"


def open_history(path: Path) -> History:
    """The lines of earlier chats, and of this one as it goes. Where that fails: one warning, and only this one's."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        data = path.read_bytes()
        data.decode()
        if b"\0" in data:
            raise ValueError("it is no text")
        if len(data) > _LARGEST_HISTORY:
            recent = data[-_KEPT_HISTORY:]
            path.write_bytes(recent[recent.find(b"\n\n") + 1 :])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        say(f"warning: the history {path} cannot be used ({reason}): this chat starts without one")
        return InMemoryHistory()
    return FileHistory(str(path))
