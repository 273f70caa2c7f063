"""Failures of the tokenizers library, made into errors that a user can read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from offmoe.base.errors import CheckpointError, OffmoeError


@contextmanager
def tokenizing(where: str) -> Iterator[None]:
    """Turn an exception of the tokenizers library, or of transformers around it, into a CheckpointError about `where`.

    A damaged tokenizer.json may pass when it is read and fail at some text. The library then raises a bare Exception,
    or a panic of its Rust code, which Python does not count among the Exceptions.
    """
    try:
        yield
    except (OffmoeError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{where} has a tokenizer that cannot be read: {reason}; download tokenizer.json again"
        ) from None
