"""The contract of everything that moves expert bytes: start now, be told when they have arrived."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

CopyPart = tuple[torch.Tensor, torch.Tensor]
"""Sources and targets of copies: contiguous uint8 tensors of one dimension and equal size."""


class CancelledMoveError(RuntimeError):
    """Waited for a move that was taken back before it was complete."""


class Ticket(Protocol):
    """One move under way.

    The destination may be read after `wait()` has returned. The source may be written to, and the destination given to
    another move, once `done()` is True or `wait()` has raised. A ticket does not promise when the move starts, nor any
    order among tickets. One thread uses it.
    """

    def done(self) -> bool:
        """True when the bytes have arrived or the move has failed or was taken back, and nothing of it is under way.

        Never blocks.
        """

    def wait(self) -> None:
        """Until work that the caller submits to the destination's device afterwards sees the bytes.

        Threads block until they are there. A CUDA copy blocks until it is queued, and makes the caller's current
        stream wait for it. Raises what the move failed with, CancelledMoveError when it was taken back; by then
        nothing of it is under way. May be called again, also after a KeyboardInterrupt.
        """

    def cancel(self) -> bool:
        """Take back what has not begun. True: the move will not complete; False: all of it has begun or ended."""

    def promote(self) -> None:
        """Make it urgent. Nothing happens where it is, or has ended."""


class Copier(Protocol):
    """Moves bytes between memories. One thread calls it."""

    def copy(self, parts: Sequence[CopyPart], *, urgent: bool = True, after: object | None = None) -> Ticket:
        """Start copying each source over its destination. Sources and destinations must live until `done()`.

        An urgent copy overtakes those that are not, also one that is half carried. Nothing is written before the point
        `after`, which `mark()` returned. Raises ValueError for parts that cannot be copied, and after close().
        """

    def mark(self) -> object | None:
        """The point that the caller's submitted work has reached; None where work has ended when it returns."""

    def restart(self) -> None:
        """End every copy, also those whose ticket was lost. Afterwards nobody writes, and copies may be started."""

    def close(self) -> None:
        """Finish what was started and release threads; no copy may be started afterwards."""


def check_parts(parts: Sequence[CopyPart]) -> None:
    """Raise ValueError unless each source can be copied over its destination byte for byte."""
    for src, dst in parts:
        if src.dtype != torch.uint8 or dst.dtype != torch.uint8 or src.nbytes != dst.nbytes:
            raise ValueError(
                f"cannot copy {src.nbytes} bytes of {src.dtype} over {dst.nbytes} bytes of {dst.dtype}; "
                "only equal numbers of uint8 are copied"
            )
        if src.dim() != 1 or dst.dim() != 1 or not (src.is_contiguous() and dst.is_contiguous()):
            raise ValueError(
                f"only contiguous tensors of one dimension are copied, not {tuple(src.shape)} with strides "
                f"{src.stride()} over {tuple(dst.shape)} with strides {dst.stride()}"
            )


def split(parts: Sequence[CopyPart], chunk_bytes: int) -> Iterator[list[CopyPart]]:
    """The parts in order, cut and gathered to chunks of `chunk_bytes`; the last one may be smaller."""
    chunk: list[CopyPart] = []
    room = chunk_bytes
    for src, dst in parts:
        begin = 0
        while begin < src.nbytes:
            num_bytes = min(room, src.nbytes - begin)
            is_whole = num_bytes == src.nbytes
            chunk.append((src, dst) if is_whole else (src.narrow(0, begin, num_bytes), dst.narrow(0, begin, num_bytes)))
            begin += num_bytes
            room -= num_bytes
            if not room:
                yield chunk
                chunk, room = [], chunk_bytes
    if chunk:
        yield chunk


def count_bytes(parts: Sequence[CopyPart]) -> int:
    """Bytes that copying `parts` moves."""
    return sum(src.nbytes for src, _ in parts)


def move_bytes(src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy within host memory on the calling thread alone, without the interpreter lock.

    Tensor.copy_ would start torch's thread pool once more for each thread that copies.
    """
    ctypes.memmove(dst.data_ptr(), src.data_ptr(), src.nbytes)
