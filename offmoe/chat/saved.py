"""Conversations as files: JSON with the messages, and the name of the model that they were held with."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path

from offmoe.chat.messages import check_messages
from offmoe.chat.template import Message
from offmoe.core.errors import OutputError, UsageError
from offmoe.core.files import check_output, write_whole

_MARK, _VERSION = "offmoe_conversation", 1
# Far above any context; a larger file is something else.
_MOST_BYTES = 64 << 20


def save_messages(path: Path, messages: Sequence[Message], *, model: str) -> None:
    """Write, or replace a file that was written so. It is whole or not there.

    Raises UsageError for a file that is something else, OutputError where the system refuses.
    """
    check_output(path, "a saved conversation", _is_saved)
    record = {_MARK: _VERSION, "model": model, "messages": list(messages)}
    try:
        write_whole(path, (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None


def read_messages(path: Path) -> list[Message]:
    """The messages of a saved conversation. Raises UsageError for anything that is none."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a device may never end, and a pipe may never begin
            raise UsageError(f"{path} is no saved conversation: it is no regular file")
        if status.st_size > _MOST_BYTES:
            raise UsageError(f"{path} has {status.st_size} bytes, too many for a conversation")
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is no saved conversation: not JSON text") from None
    if not isinstance(record, dict) or record.get(_MARK) != _VERSION or not isinstance(record.get("messages"), list):
        raise UsageError(f"{path} is no saved conversation: it lacks {_MARK!r}: {_VERSION} or a list of 'messages'")
    messages: list[Message] = record["messages"]
    check_messages(messages)
    return [dict(message) for message in messages]


def _is_saved(path: Path) -> bool:
    try:
        read_messages(path)
    except UsageError:
        return False
    return True
