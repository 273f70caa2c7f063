"""A chat that remembers what was said."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from offmoe.chat.messages import chat_ids, check_messages
from offmoe.chat.saved import read_messages, save_messages
from offmoe.chat.template import Message, check_arguments, words
from offmoe.core.errors import UsageError
from offmoe.engine.reply import Reply, collect
from offmoe.engine.stream import Chunk, Stream
from offmoe.hf.door import PreTrainedTokenizerBase
from offmoe.sampling.params import ChatOptions, RequestOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ConversationEngine(Protocol):
    """The part of an engine that a conversation works with."""

    tokenizer: PreTrainedTokenizerBase | None
    folder: Path

    def stream_chat(
        self, messages: Sequence[Message], *, chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False, continue_final_message: bool = False, **options: Unpack[RequestOptions],
    ) -> Stream:  # fmt: skip
        """See `Engine.stream_chat`."""


class Conversation:
    """Messages and the engine that answers them. Several may share an engine; they take turns.

    An exchange is remembered when its stream ended or was closed, with what was answered until then. A question without
    any answer is not among the messages, since two turns of the user in a row would break many chat templates: it is
    kept for `retry`, until the next exchange.
    """

    def __init__(
        self, engine: ConversationEngine, *, system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, allow_control_tokens: bool = False,
    ) -> None:  # fmt: skip
        """Raises UsageError when the engine has no tokenizer. Other options as of `Engine.stream_chat`."""
        if engine.tokenizer is None:
            raise UsageError(f"{engine.folder} has no tokenizer, which a conversation needs")
        self._engine, self._tokenizer = engine, engine.tokenizer
        self._template: ChatOptions = {
            "chat_template_kwargs": dict(chat_template_kwargs or {}), "allow_control_tokens": allow_control_tokens
        }  # fmt: skip
        # A reply is gone on from as it was computed: reading it again would cost its time once more at every turn.
        config = getattr(engine, "config", None)
        self._reuse = None if getattr(config, "placement_invariant", False) else True
        check_arguments(engine.tokenizer, chat_template_kwargs or {})
        self.messages: list[Message] = []
        # The last question, where nothing was answered: `retry` asks it again.
        self._unanswered: Message | None = None
        if system:
            self.system = system

    def __repr__(self) -> str:
        return f"<Conversation [{len(self.messages)} messages]>"

    @property
    def system(self) -> str | None:
        """The system message; setting None takes it away. What was said stays."""
        first = self.messages[0] if self.messages else None
        return words(first) if first and first["role"] == "system" else None

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

    def ask(self, text: str, **options: Unpack[ChatOptions]) -> Reply:
        """The reply to `text`. Options and errors as of `Engine.stream`."""
        return collect(self.stream(text, **options))

    def stream(self, text: str, **options: Unpack[ChatOptions]) -> Stream:
        """Stream the reply to `text`, chunk by chunk; see `ask`."""
        return self._exchange([*self.messages, {"role": "user", "content": text}], options)

    def retry(self, **options: Unpack[ChatOptions]) -> Stream:
        """A reply to the user's last message, in the place of the one that it has. Raises UsageError without any."""
        return self._exchange(self._until_last_user(), options)

    def undo(self) -> str:
        """Take the user's last message and its reply away; return that message. Raises UsageError without any."""
        *before, last = self._until_last_user()
        self.messages, self._unanswered = before, None
        return words(last)

    def set_template(self, **arguments: Any) -> None:
        """Set arguments of the chat template for the replies to come. Raises UsageError for one that it has not."""
        changed = {**(self._template["chat_template_kwargs"] or {}), **arguments}
        check_arguments(self._tokenizer, changed)
        self._template["chat_template_kwargs"] = changed

    def last_question(self) -> str:
        """The last message of the user. Raises UsageError without any."""
        return words(self._until_last_user()[-1])

    def reset(self) -> None:
        """Forget what was said, but for the system message."""
        self._unanswered = None
        self.messages = self.messages[: 0 if self.system is None else 1]

    def num_tokens(self) -> int:
        """Length of the next prompt's beginning, in tokens; 0 for an empty conversation."""
        if not self.messages:
            return 0
        arguments, allow = self._template["chat_template_kwargs"], self._template["allow_control_tokens"]
        return len(chat_ids(self._tokenizer, self.messages, arguments=arguments, allow_control_tokens=allow))

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON. Raises UsageError for a file that is something else, OutputError."""
        save_messages(Path(path), self.messages, model=self._engine.folder.name)

    def load(self, path: str | Path) -> None:
        """Go on with a saved conversation. Raises UsageError, and then nothing is changed."""
        self.messages = read_messages(Path(path))
        self._unanswered = None

    def _until_last_user(self) -> list[Message]:
        if self._unanswered is not None:
            return [*self.messages, self._unanswered]
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise UsageError("nothing was asked yet")
        return self.messages[: users[-1] + 1]

    def _exchange(self, asked: list[Message], options: ChatOptions) -> Stream:
        given: ChatOptions = {"reuse": self._reuse, **self._template, **options}
        chunks = self._engine.stream_chat(asked, **given)  # what is wrong with the request is raised here, at once
        return Stream(self._remember(asked, chunks), chunks.closed, prompt_ids=chunks.prompt_ids)

    def _remember(self, asked: list[Message], chunks: Stream) -> Generator[Chunk, None, None]:
        answer: list[str] = []
        try:
            for chunk in chunks:
                if not chunk.reasoning:
                    answer.append(chunk.text)
                yield chunk
        finally:
            chunks.close()
            said = "".join(answer)
            if said.strip():
                self.messages = [*asked, {"role": "assistant", "content": said}]
                self._unanswered = None
            elif asked[:-1] == self.messages:
                self._unanswered = asked[-1]
