"""A chat that remembers what was said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offmoe.base.errors import UsageError
from offmoe.generation.chat import Message, chat_ids, check_messages
from offmoe.generation.reply import Reply, collect
from offmoe.generation.saved_chat import read_messages, save_messages

if TYPE_CHECKING:
    from offmoe.generation.engine import Engine
    from offmoe.generation.stream import Piece


class Conversation:
    """Messages and the engine that answers them. Several may share an engine; they take turns.

    An exchange is remembered when its stream ended or was closed, with what was answered until then; one without any
    answer is forgotten, since two turns of the user in a row would break many chat templates.
    """

    def __init__(self, engine: Engine, *, system: str | None = None) -> None:
        """Raises UsageError when the engine has no tokenizer."""
        if engine.tokenizer is None:
            raise UsageError(f"{engine.folder} has no tokenizer, which a conversation needs")
        self._engine, self._tokenizer = engine, engine.tokenizer
        self.messages: list[Message] = []
        if system:
            self.system = system

    def __repr__(self) -> str:
        return f"<Conversation [{len(self.messages)} messages]>"

    @property
    def system(self) -> str | None:
        """The system message; setting None takes it away. What was said stays."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[0 if self.system is None else 1 :]
        message: list[Message] = [{"role": "system", "content": text}] if text else []
        check_messages(message)
        self.messages = message + rest

    @property
    def num_turns(self) -> int:
        """The user's messages."""
        return sum(message["role"] == "user" for message in self.messages)

    def ask(self, text: str, **options: Any) -> Reply:
        """The reply to `text`. Options and errors as of `Engine.stream`."""
        return collect(self.stream(text, **options))

    def stream(self, text: str, **options: Any) -> Iterator[Piece]:
        """As `ask`, piece by piece."""
        return self._exchange([*self.messages, {"role": "user", "content": text}], options)

    def retry(self, **options: Any) -> Iterator[Piece]:
        """Another reply to the user's last message, in the place of the first one. Raises UsageError without any."""
        return self._exchange(self._until_last_user(), options)

    def last_question(self) -> str:
        """The last message of the user. Raises UsageError without any."""
        return self._until_last_user()[-1]["content"]

    def reset(self) -> None:
        """Forget what was said, but for the system message."""
        self.messages = self.messages[: 0 if self.system is None else 1]

    def num_tokens(self) -> int:
        """What the next prompt begins with, in tokens; 0 for an empty conversation."""
        return len(chat_ids(self._tokenizer, self.messages)) if self.messages else 0

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON. Raises UsageError for a file that is something else, OutputError."""
        save_messages(Path(path), self.messages, model=self._engine.folder.name)

    def load(self, path: str | Path) -> None:
        """Go on with a saved conversation. Raises UsageError, and then nothing is changed."""
        self.messages = read_messages(Path(path))

    def _until_last_user(self) -> list[Message]:
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise UsageError("nothing was asked yet")
        return self.messages[: users[-1] + 1]

    def _exchange(self, asked: list[Message], options: dict[str, Any]) -> Iterator[Piece]:
        pieces = self._engine.stream_chat(asked, **options)  # what is wrong with the request is raised here, at once
        return self._remember(asked, pieces)

    def _remember(self, asked: list[Message], pieces: Iterator[Piece]) -> Iterator[Piece]:
        answer: list[str] = []
        try:
            for piece in pieces:
                if not piece.reasoning:
                    answer.append(piece.text)
                yield piece
        finally:
            pieces.close()  # type: ignore[attr-defined]
            said = "".join(answer)
            if said.strip():
                self.messages = [*asked, {"role": "assistant", "content": said}]
