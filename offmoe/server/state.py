"""State of a running server: the model being loaded or served, its queue, its counts. One thread owns the engine."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from offmoe.core.errors import EngineClosedError, OffmoeError
from offmoe.engine.engine import Engine
from offmoe.engine.engine_stats import EngineStats
from offmoe.server.errors import ApiError
from offmoe.server.events import ReplyEnd
from offmoe.server.expert_watch import ExpertWatch
from offmoe.server.jobs import JobQueue
from offmoe.server.metrics import Measured
from offmoe.server.settings import ServerSettings

_log = logging.getLogger("offmoe.server")
_SNAPSHOT_S = 1.0


class ServedModel:
    """The engine behind the endpoints. `load` makes it, on a thread of its own that then runs the requests.

    The thread alone touches the engine's generation; other threads tokenize, check requests and read the last
    snapshot of its statistics.
    """

    def __init__(
        self, settings: ServerSettings, load: Callable[[Callable[[str, int, int], None]], Engine], *,
        name: str, closes_engine: bool = True, on_failure: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.settings, self.name = settings, name
        self.queue = JobQueue(settings.queue_size)
        self.measured = Measured()
        self.created = int(time.time())
        self.error: BaseException | None = None
        self.stats: EngineStats | None = None
        self._load, self._closes_engine, self._on_failure = load, closes_engine, on_failure
        self._engine: Engine | None = None
        self._progress: tuple[str, int, int] = ("starting", 0, 0)
        self._snapshot_at = 0.0
        self.watch = ExpertWatch()
        self.loaded = threading.Event()
        self._thread = threading.Thread(target=self._run, name="offmoe-server-engine", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def close(self) -> None:
        """End the running reply with what it has, refuse what waits, close the engine. Waits for the thread."""
        self.queue.close()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def engine(self) -> Engine:
        """The engine. Raises ApiError 503 while it is loading, with how far it is."""
        if self._engine is not None:
            return self._engine
        raise ApiError(
            503, f"the model is loading: {self.progress_line()}", kind="server_error", code="model_loading",
            headers={"Retry-After": "5"},
        )  # fmt: skip

    @property
    def is_ready(self) -> bool:
        """The engine is there."""
        return self._engine is not None

    def progress(self) -> dict[str, Any]:
        """State of the load."""
        stage, done, total = self._progress
        return {"stage": stage, "done_bytes": done, "total_bytes": total}

    def progress_line(self) -> str:
        """The same for people."""
        stage, done, total = self._progress
        return f"{stage}, {100 * done // total}%" if total else stage

    def salt(self, api_key: str | None) -> str | None:
        """Name under which prompts of a key are kept; None: shared."""
        if api_key is None or self.settings.share_prompts:
            return None
        return hashlib.sha256(f"offmoe\0{api_key}".encode()).hexdigest()

    def after_token(self) -> None:
        """Take the engine's statistics, once a second at most, and tell those who watch. On the engine's thread."""
        engine = self._engine
        if engine is None:
            return
        self.watch.look(engine)
        if (now := time.monotonic()) - self._snapshot_at >= _SNAPSHOT_S:
            self._snapshot_at = now
            self.stats = engine.stats()

    def on_end(self, end: ReplyEnd) -> None:
        """Count a finished reply."""
        self.measured.replied(end)

    def names(self) -> tuple[str, ...]:
        """Names that a request may have for the model."""
        return (self.name, *self.settings.aliases)

    def _run(self) -> None:
        try:
            engine = self._load(self._note)
            self.stats = engine.stats()
            self._engine = engine
        except BaseException as error:  # noqa: BLE001 - told by who started the server
            self.error = error
            self.loaded.set()
            self._on_failure()
            return
        self.loaded.set()
        try:
            self.queue.run(after=self._after_job)
        finally:
            self._engine = None
            if self._closes_engine:
                try:
                    engine.close()
                except OffmoeError as error:
                    _log.warning("closing the engine: %s", error)

    def _note(self, stage: str, done: int, total: int) -> None:
        self._progress = (stage, done, total)

    def _after_job(self) -> None:
        self._snapshot_at = 0.0
        try:
            self.after_token()
        except EngineClosedError as error:  # a device was lost: nothing can be served any more
            self.error = error
            self.queue.close()
            self._on_failure()
