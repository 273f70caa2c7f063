"""Iterators that run on threads of their own: reading, computing and writing overlap.

Concurrency. The thread runs the iterator, and nobody else does; the consumer takes items from a queue of a fixed
length, so at most `depth` items wait, one is being made and one is in use. Errors of the iterator are raised where its
next item would have been. When the consumer stops early, `close` (or the end of a `with closing(...)`) waits for the
item that is being made and closes the iterator on its thread: after it nothing runs any more.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from offmoe.core.errors import ResourceError

T = TypeVar("T")


class SourceItem(Protocol):
    """A part of a checkpoint that is read, and of which something is written."""

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""


Item = TypeVar("Item", bound=SourceItem)
_LOOK_S = 0.1  # how often a thread with a full queue looks whether anybody still wants its items


class BackgroundIterator(Iterator[T], Generic[T]):
    """The items of `source`, in order. The thread is begun at once."""

    def __init__(self, source: Iterator[T], depth: int) -> None:
        """At most `depth` items wait. Raises ResourceError when the system refuses a thread."""
        self._source = source
        self._items: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
        self._is_closed = False
        self._thread = threading.Thread(target=self._make, name="offmoe-background", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise ResourceError(f"the system refuses a thread ({error}); end other programs") from None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._is_closed:
            raise StopIteration
        found = self._items.get()
        if isinstance(found, tuple):
            return found[0]
        self.close()
        if found is None:
            raise StopIteration
        raise found

    def close(self) -> None:
        """Make no further items. Returns when the thread has ended."""
        self._is_closed = True
        self._thread.join()

    def _make(self) -> None:
        last: BaseException | None = None
        try:
            for item in self._source:
                if not self._put((item,)):
                    break
        except BaseException as error:  # noqa: BLE001  # raised by the consumer's thread
            last = error
        finally:
            close = getattr(self._source, "close", None)
            if close is not None:
                close()
        self._put(last)

    def _put(self, item: tuple[T] | BaseException | None) -> bool:
        """False where nobody takes it any more."""
        while not self._is_closed:
            with suppress(queue.Full):
                self._items.put(item, timeout=_LOOK_S)
                return True
        return False


@dataclass(frozen=True, kw_only=True)
class Stages(Generic[Item]):
    """Steps from the items of a checkpoint to the bytes of another one.

    `written_bytes` of an item; `read`: the items' contents, in pieces; `encode`: pieces of the result, each with the
    bytes of the source that it stands for. At most `depths` pieces wait behind `read` and behind `encode`.
    """

    written_bytes: Callable[[Item], int]
    read: Callable[[Sequence[Item]], Iterator[Any]]
    encode: Callable[[Iterator[Any]], Iterator[tuple[bytes | memoryview, int]]]
    depths: tuple[int, int]

    def run(
        self, items: Sequence[Item], skip: int, count: Callable[[int], None]
    ) -> Generator[bytes | memoryview, None, None]:
        """The result from byte `skip` on; items that end before it are not read. `count` is told of bytes of the source
        that are done. Reading and encoding each have a thread, which ends with the generator.
        """
        left = list(items)
        while left and skip >= (size := self.written_bytes(left[0])):
            skip -= size
            count(left.pop(0).num_bytes)
        with (
            closing(BackgroundIterator(self.read(left), self.depths[0])) as contents,
            closing(BackgroundIterator(self.encode(contents), self.depths[1])) as encoded,
        ):
            for piece, num_bytes in encoded:
                if skip < len(piece):
                    yield piece[skip:]
                skip = max(0, skip - len(piece))
                count(num_bytes)
