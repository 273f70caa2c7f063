"""What the systems reported, round by round, and the medians a table shows. Plain Python; knows no system."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchlib.cgroup import Finished
from benchlib.peers import System
from benchlib.sizes import format_gb

# A cap does not count pages that another process brought in: libraries in use elsewhere, which is harmless, or the
# model itself, which is not.
SHARED_BYTES = 500_000_000
REQUIRED = ("load_s", "prefill_tok_per_s", "decode_tok_per_s")


@dataclass(frozen=True, kw_only=True)
class Round:
    """One run of one system: what it reported, or why there is no report."""

    finished: Finished
    report: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One system over its rounds: medians of speeds and disk reads, maxima of memory. None: not known."""

    system: System
    rounds: tuple[Round, ...]

    @property
    def failure(self) -> str:
        """Why the system has no numbers; empty when it has."""
        return next((round_.failure for round_ in self.rounds if round_.failure), "")

    def median(self, key: str) -> float | None:
        """Median over rounds of a number in the report."""
        values = [round_.report[key] for round_ in self.rounds if round_.report.get(key) is not None]
        return statistics.median(values) if values else None

    def spread(self, key: str) -> tuple[float, float] | None:
        """Smallest and largest over rounds of a number in the report."""
        values = [round_.report[key] for round_ in self.rounds if round_.report.get(key) is not None]
        return (min(values), max(values)) if values else None

    @property
    def decode_mean_tok_per_s(self) -> float | None:
        """Tokens over their whole time: unlike the median over tokens it counts the slow ones. Median over rounds."""
        runs = [round_.report["decode_s"] for round_ in self.rounds if round_.report.get("decode_s")]
        means: list[float] = [len(token_s) / sum(token_s) for token_s in runs]
        return statistics.median(means) if means else None

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident set of the process, mapped file pages included."""
        return max(round_.finished.peak_rss_bytes for round_ in self.rounds)

    @property
    def disk_read_bytes(self) -> float:
        """Bytes the process had read from disk in its whole run, loading included."""
        return statistics.median(round_.finished.disk_read_bytes for round_ in self.rounds)

    @property
    def cgroup_peak_bytes(self) -> int | None:
        """Most memory ever charged to the capped group, page cache included."""
        peaks = [round_.finished.cgroup_peak_bytes for round_ in self.rounds]
        return max((peak for peak in peaks if peak is not None), default=None)

    @property
    def settings(self) -> dict[str, Any]:
        """What the system says it ran with."""
        settings: dict[str, Any] = self.rounds[0].report.get("settings") or {}
        return settings

    def as_json(self) -> dict[str, Any]:
        """The row as JSON, every round's own speeds included."""
        return {
            "failure": self.failure or None,
            "weights": self.system.weights,
            "load_s": self.median("load_s"),
            "prefill_tok_per_s": self.median("prefill_tok_per_s"),
            "decode_tok_per_s": self.median("decode_tok_per_s"),
            "decode_mean_tok_per_s": self.decode_mean_tok_per_s,
            "peak_rss_bytes": self.peak_rss_bytes,
            "cgroup_peak_bytes": self.cgroup_peak_bytes,
            "disk_read_bytes": self.disk_read_bytes,
            "disk_bytes_per_token": self.median("disk_bytes_per_token"),
            "hit_rate": self.median("hit_rate"),
            "peak_rss_growth_bytes": self.median("peak_rss_growth_bytes"),
            "rounds": [
                {key: round_.report.get(key) for key in REQUIRED}
                | {"cgroup_limit_hits": round_.finished.cgroup_limit_hits, "elapsed_s": round_.finished.elapsed_s}
                for round_ in self.rounds
            ],
            "settings": self.settings,
        }


def read_round(finished: Finished, *, cap_bytes: int | None) -> Round:
    """Take the last stdout line as the report; say what is wrong where there is none, or where the cap did not hold."""
    if finished.killed:
        return Round(finished=finished, failure="killed (out of memory)" if cap_bytes else "killed")
    if cap_bytes and finished.peak_rss_bytes > cap_bytes + SHARED_BYTES:
        peak = format_gb(finished.peak_rss_bytes)
        return Round(finished=finished, failure=f"above the cap at {peak}: another process has its files in memory")
    if finished.returncode != 0:
        return Round(finished=finished, failure=f"failed (exit code {finished.returncode})")
    lines = finished.stdout.strip().splitlines()
    try:
        report = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        report = None
    if not isinstance(report, dict):
        return Round(finished=finished, failure="printed no JSON line")
    missing = [key for key in REQUIRED if not isinstance(report.get(key), int | float)]
    if missing:
        return Round(finished=finished, failure=f"reported no {', '.join(missing)}")
    return Round(finished=finished, report=report)


def decode_ratios(summaries: Sequence[Summary]) -> dict[str, float]:
    """How many times faster the first system decodes than each other one that finished."""
    first = summaries[0].median("decode_tok_per_s")
    others = {summary.system.name: summary.median("decode_tok_per_s") for summary in summaries[1:]}
    return {name: first / speed for name, speed in others.items() if first and speed}


def agreement(summary: Summary, summaries: Sequence[Summary]) -> float | None:
    """Share of positions where the greedy next id is that of the first other system that tells its own."""
    own = summary.rounds[0].report.get("next_ids")
    for other in summaries:
        theirs = other.rounds[0].report.get("next_ids")
        if own and theirs and other is not summary:
            same = [a == b for a, b in zip(own, theirs, strict=False)]
            return statistics.fmean(same)
    return None
