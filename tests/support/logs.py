"""Warnings of the package's logger: expected ones in a `with`, others fail the test that gave them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

# Where messages go: the innermost last.
_collected: list[list[str]] = []


class _Collector(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _collected[-1].append(record.getMessage())


@contextmanager
def collected() -> Iterator[list[str]]:
    """Within: messages of warnings that the package logs, from any thread."""
    messages: list[str] = []
    handler, logger = _Collector(logging.WARNING), logging.getLogger("offmoe")
    _collected.append(messages)
    if len(_collected) == 1:
        logger.addHandler(handler)
    try:
        yield messages
    finally:
        if len(_collected) == 1:
            logger.removeHandler(handler)
        _collected.pop()


@contextmanager
def logs_warning(match: str) -> Iterator[list[str]]:
    """Within: a warning must be logged that has the pattern `match` in it, in one printable line."""
    with collected() as messages:
        yield messages
    assert any(re.search(match, message) for message in messages), f"{match=} {messages=}"
    assert all(message.isprintable() for message in messages), messages
