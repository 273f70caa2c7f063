"""One reply at a time: the engine is held from a stream's first chunk to its last, and failures come out explained."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from offmoe.core.errors import DeviceError, EngineBusyError, EngineClosedError, OffmoeError
from offmoe.engine.stream import Chunk
from offmoe.hf.device_failures import explain

if TYPE_CHECKING:
    from offmoe.tiers.device import Device

_BUSY = "the engine is generating; finish or close that stream first"


class ReplyLock:
    """The lock of an engine. `is_open` says whether the engine is, `give_up` closes it when its device is lost."""

    def __init__(self, is_open: Callable[[], bool], give_up: Callable[[], None]) -> None:
        self._running = threading.Lock()
        self._is_open, self._give_up = is_open, give_up

    def check(self) -> None:
        """Raise EngineBusyError while a reply is under way."""
        if self._running.locked():
            raise EngineBusyError(_BUSY)

    def hold(
        self, find_device: Callable[[], Device | None], begin: Callable[[], Generator[Chunk, None, None]],
        closed: threading.Event,
    ) -> Generator[Chunk, None, None]:  # fmt: skip
        """The chunks of `begin()`, with the engine held from the first to the last, or to the generator's end.

        `find_device` raises where the engine was closed since the call. None where the stream was `closed` already.
        """
        device = find_device()
        if closed.is_set():
            return
        if not self._running.acquire(blocking=False):
            raise EngineBusyError(_BUSY)
        better: OffmoeError | None = None
        try:
            yield from begin()
        except Exception as error:
            if not self._is_open():  # whatever a close in another thread broke off, the user should hear of the close
                raise EngineClosedError("the engine was closed while it was generating; load the model again") from None
            better = error if isinstance(error, DeviceError) else explain(error, device)
            if better is None:
                raise
        finally:
            self._running.release()
        if isinstance(better, DeviceError):
            self._give_up()
        if better is not None:  # not in the handler: a traceback that is referred to keeps tensors on the device
            raise better
