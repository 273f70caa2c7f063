"""The contract of everything that moves expert bytes: start now, be told when they have arrived."""

from __future__ import annotations

import contextlib
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Ticket(Protocol):
    """One move under way.

    The destination may be read after `wait()` has returned, and not be reused before. A ticket does not promise when
    the move starts, nor any order among tickets.
    """

    def done(self) -> bool:
        """True when the bytes have arrived or the move has failed or was cancelled. Never blocks."""

    def wait(self) -> None:
        """Block until the move has ended; raise what it failed with. May be called more than once."""


class Copier(Protocol):
    """Moves tensors of equal size between memories."""

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Ticket:
        """Start copying `src` over `dst` (same type, same number of bytes, contiguous), else ValueError."""

    def close(self) -> None:
        """Finish what was started and release threads; no copy may be started afterwards."""


class DoneTicket:
    """A move that had ended before the ticket was made."""

    def done(self) -> bool:
        """Always True."""
        return True

    def wait(self) -> None:
        """Return at once."""


class FutureTicket:
    """A move made of parallel pieces, each a future; it has ended when all of them have."""

    __slots__ = ("_futures",)

    def __init__(self, futures: list[Future[None]]) -> None:
        self._futures = futures

    def done(self) -> bool:
        """True when no piece is queued or running."""
        return all(future.done() for future in self._futures)

    def wait(self) -> None:
        """Block for every piece, also when one fails, so that nobody writes to the destination afterwards.

        Raises the first failure, CancelledError for a piece that was dropped from the queue.
        """
        for future in self._futures:  # not futures.wait(): it never returns for a future cancelled by a shutdown
            with contextlib.suppress(CancelledError):
                future.exception()
        for future in self._futures:
            future.result()


def flatten(src: torch.Tensor, dst: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as one dimension, whatever their shapes; ValueError unless `src` can be copied over `dst` byte for byte."""
    if src.nbytes != dst.nbytes or src.dtype != dst.dtype:
        raise ValueError(f"cannot copy {src.nbytes} bytes of {src.dtype} over {dst.nbytes} bytes of {dst.dtype}")
    if not (src.is_contiguous() and dst.is_contiguous()):
        raise ValueError(f"only contiguous tensors are copied, not strides {src.stride()} over {dst.stride()}")
    return src.view(-1), dst.view(-1)
