"""Counts and times of a server as Prometheus reads them."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING

from offmoe.server.events import ReplyEnd

if TYPE_CHECKING:
    from offmoe.engine.engine_stats import EngineStats

_TTFT_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TPOT_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_QUEUE_S = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0)
# Names of the engine's statistics with their help.
_ENGINE_COUNTERS = {
    "hits": "Experts found in a slot.", "late_hits": "Experts that were on their way.", "misses": "Experts not there.",
    "evictions": "Experts evicted.", "disk_bytes": "Bytes of experts read from disk.",
    "link_bytes": "Bytes of experts copied to the device.", "cpu_experts": "Misses computed in RAM.",
    "ahead_bytes": "Bytes fetched ahead.", "ahead_used_bytes": "Bytes fetched ahead that were used.",
    "ahead_wasted_bytes": "Bytes fetched ahead for nothing.", "prefilled_tokens": "Prompt tokens read.",
    "reused_tokens": "Prompt tokens kept from before.", "decoded_tokens": "Tokens decoded.",
}  # fmt: skip
_ENGINE_GAUGES = {
    "experts_cached": "Slots for experts.", "experts_total": "Experts of the model.", "ram_bytes": "Budget of RAM.",
    "planned_bytes": "Planned use of RAM.", "peak_rss_growth_bytes": "Measured peak of RAM.",
    "vram_bytes": "Budget of the device.", "device_peak_bytes": "Measured peak of the device.",
}  # fmt: skip


class Distribution:
    """A histogram with fixed bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def lines(self, name: str, text: str) -> Iterator[str]:
        """The exposition format."""
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} histogram"
        seen = 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            seen += count
            yield f'{name}_bucket{{le="{bound:g}"}} {seen}'
        seen += self.counts[-1]
        yield f'{name}_bucket{{le="+Inf"}} {seen}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {seen}"


class Measured:
    """Counters of the server's own. Written by the engine's thread and the event loop, under one lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, int], int] = {}
        self._reasons: dict[str, int] = {}
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._num_cancelled = 0
        self._ttft, self._tpot, self._queued = Distribution(_TTFT_S), Distribution(_TPOT_S), Distribution(_QUEUE_S)

    def answered(self, path: str, status: int) -> None:
        """Count a response."""
        with self._lock:
            self._requests[path, status] = self._requests.get((path, status), 0) + 1

    def cancelled(self) -> None:
        """Count a client that left."""
        with self._lock:
            self._num_cancelled += 1

    def replied(self, end: ReplyEnd) -> None:
        """Count a reply."""
        with self._lock:
            self._reasons[end.reason] = self._reasons.get(end.reason, 0) + 1
            self._generated_tokens += end.num_tokens
            self._queued.add(end.queue_s)
            if (stats := end.stats) is None:
                return
            self._prompt_tokens += stats.prompt_tokens
            self._cached_tokens += stats.reused_tokens
            if stats.new_tokens:
                self._ttft.add(stats.prefill_s)
            for step_s in stats.step_s:
                self._tpot.add(step_s)

    def exposition(self, stats: EngineStats | None, *, waiting: int, running: int, refused: int) -> str:
        """All of it in Prometheus' text format."""
        with self._lock:
            lines = [*self._own_lines(waiting, running, refused)]
        if stats is not None:
            lines += _engine_lines(stats)
        return "\n".join(lines) + "\n"

    def _own_lines(self, waiting: int, running: int, refused: int) -> Iterator[str]:
        yield from _head("requests_total", "counter", "Responses by endpoint and status.")
        for (path, status), count in sorted(self._requests.items()):
            yield f'offmoe_requests_total{{endpoint="{path}",status="{status}"}} {count}'
        yield from _head("replies_total", "counter", "Replies by the reason for their end.")
        for reason, count in sorted(self._reasons.items()):
            yield f'offmoe_replies_total{{finish_reason="{reason}"}} {count}'
        for name, value, text in (
            ("prompt_tokens_total", self._prompt_tokens, "Tokens of prompts."),
            ("cached_prompt_tokens_total", self._cached_tokens, "Of these, not read again."),
            ("generated_tokens_total", self._generated_tokens, "Tokens generated."),
            ("requests_cancelled_total", self._num_cancelled, "Requests whose client left."),
            ("requests_refused_total", refused, "Requests refused because the queue was full."),
        ):
            yield from _head(name, "counter", text)
            yield f"offmoe_{name} {value}"
        for name, value, text in (
            ("requests_waiting", waiting, "Requests in the queue."),
            ("requests_running", running, "Requests in the engine."),
        ):
            yield from _head(name, "gauge", text)
            yield f"offmoe_{name} {value}"
        yield from self._ttft.lines("offmoe_time_to_first_token_seconds", "Begin in the engine to the first token.")
        yield from self._tpot.lines("offmoe_time_per_output_token_seconds", "Time of each token after the first.")
        yield from self._queued.lines("offmoe_queue_seconds", "Time that requests waited.")


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP offmoe_{name} {text}"
    yield f"# TYPE offmoe_{name} {kind}"


def _engine_lines(stats: EngineStats) -> Iterator[str]:
    values = stats.as_dict()
    for names, kind, suffix in ((_ENGINE_COUNTERS, "counter", "_total"), (_ENGINE_GAUGES, "gauge", "")):
        for name, text in names.items():
            if values.get(name) is not None:
                yield from _head(f"engine_{name}{suffix}", kind, text)
                yield f"offmoe_engine_{name}{suffix} {values[name]}"
