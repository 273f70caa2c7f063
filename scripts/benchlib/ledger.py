"""What has been measured so far, on disk after every measurement: the machine may be taken away at any moment."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Ledger:
    """Records in the order of measurement, and the time that is left for more."""

    def __init__(self, path: Path | None, *, limit_s: float) -> None:
        self._path = path
        self._end_s = time.monotonic() + limit_s
        self.records: list[dict[str, Any]] = []

    @property
    def left_s(self) -> float:
        """Seconds until the limit; negative after it."""
        return self._end_s - time.monotonic()

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Everything that did not go as it must: errors, and checks that did not hold."""
        return [record for record in self.records if record["kind"] == "failure" or record.get("ok") is False]

    def add(self, kind: str, **values: Any) -> None:
        """Keep a record, write all of them, tell stderr."""
        record = {"kind": kind, **{name: _rounded(value) for name, value in values.items()}}
        self.records.append(record)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(".tmp")
            partial.write_text(json.dumps({"records": self.records}) + "\n", encoding="utf-8")
            partial.replace(self._path)
        print(f"[{self.left_s:4.0f} s left] {_short(record)}", file=sys.stderr, flush=True)

    @contextmanager
    def step(self, where: str, *, needs_s: float = 5.0) -> Iterator[None]:
        """Within: one part of the work. What it raises becomes a record, and the next part goes on.

        Raises TimeIsUpError before it begins when fewer than `needs_s` seconds are left, which is recorded too.
        """
        if self.left_s < needs_s:
            self.add("skipped", where=where, why=f"{self.left_s:.0f} s are left, it takes about {needs_s:.0f}")
            raise TimeIsUpError(where)
        try:
            yield
        except TimeIsUpError:
            raise
        except Exception as error:  # noqa: BLE001 - a benchmark tells what failed and goes on
            frames = traceback.extract_tb(error.__traceback__)
            at = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-5:]))
            text = " ".join(str(error).split())[:500]
            self.add("failure", where=where, error=f"{type(error).__name__}: {text}", at=at)


class TimeIsUpError(Exception):
    """There is no time for this part; the parts after it may be shorter."""


def _rounded(value: Any) -> Any:
    """Six digits are more than a measurement has."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _short(record: dict[str, Any]) -> str:
    words = [f"{value:.4g}" if isinstance(value, float) else str(value)
             for value in record.values() if not isinstance(value, dict)]  # fmt: skip
    return " ".join(words)[:240]
