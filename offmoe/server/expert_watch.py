"""The live picture of experts: for those who watch, what each token did with which expert.

The engine's thread looks, at most twenty times a second and only while somebody watches; the event loop sends. A slow
watcher misses pictures and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator

from offmoe.engine.engine import Engine
from offmoe.engine.expert_view import ExpertView

MOST_WATCHERS = 16
_LEAST_S = 0.05
_SILENCE_S = 10.0


class ExpertWatch:
    """Watchers of one engine. `look` is called on the engine's thread after each token."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watchers: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._view: ExpertView | None = None
        self._last = 0.0
        self.picture = b""

    def look(self, engine: Engine) -> None:
        """Take a picture, if somebody watches."""
        if not self._watchers or (now := time.monotonic()) - self._last < _LEAST_S:
            return
        self._last = now
        if self._view is None:
            self._view = ExpertView(engine)
        self.picture = f"data: {json.dumps(self._view.look())}\n\n".encode()
        with self._lock:
            watchers = list(self._watchers.items())
        for ready, loop in watchers:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ready.set)

    async def pictures(self) -> AsyncIterator[bytes]:
        """Pictures as they come; a comment now and then."""
        ready = asyncio.Event()
        if self.picture:
            ready.set()
        with self._lock:
            self._watchers[ready] = asyncio.get_running_loop()
        try:
            yield b": watching\n\n"
            while True:
                try:
                    await asyncio.wait_for(ready.wait(), _SILENCE_S)
                except (TimeoutError, asyncio.TimeoutError):
                    yield b": nothing new\n\n"
                    continue
                ready.clear()
                yield self.picture
        finally:
            with self._lock:
                del self._watchers[ready]

    @property
    def is_full(self) -> bool:
        """No more may watch."""
        return len(self._watchers) >= MOST_WATCHERS
