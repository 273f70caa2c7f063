"""Checks of what goes into a tokenizer and comes out of it, and its failures as errors that a user can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from offmoe.core.errors import CheckpointError, OffmoeError, UsageError


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


def check_rows(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> list[int]:
    """Ids that a tokenizer made of text. Raises UsageError naming the first token that the embedding has no row for."""
    bad = next((token for token in ids if token >= vocab_size), None)
    if bad is not None:
        raise UsageError(
            f"the prompt holds {tokenizer.convert_ids_to_tokens(int(bad))!r}, token {bad} of the tokenizer, and the "
            f"model's embedding has {vocab_size} rows; leave that text out, or use the model's own tokenizer"
        )
    return list(ids)


def check_text(text: str, what: str) -> None:
    """Raise UsageError for text that no tokenizer can take: halves of surrogate pairs, from a broken encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} has {text[error.start]!r} at character {error.start}, not valid Unicode; mend its encoding"
        ) from None
