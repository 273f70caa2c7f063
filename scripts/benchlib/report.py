"""A side-by-side as Markdown: when, what was run, on what, the table, and every system's settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchlib.results import Summary, agreement, decode_ratios
from benchlib.sizes import format_gb

HEADINGS = (
    "system", "weights", "load s", "prefill tok/s", "decode tok/s", "rounds", "mean tok/s", "GB/s", "disk read",
    "peak RSS", "cgroup max", "hit rate", "same id", "ratio",
)  # fmt: skip
LEGEND = (
    "decode: median over tokens, then over rounds; rounds: its smallest and largest; mean: tokens over all their time; "
    "GB/s: decode times the weights a token reads, in the system's own weight size; disk read: by the process in its "
    "whole run, loading included; peak RSS: largest resident set, mapped file pages included; cgroup max: most memory "
    "charged, page cache included; same id: share of greedy next ids equal to those of the first other system that "
    "tells them; ratio: how many times faster the first system decodes."
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What stands above the table."""

    date: str
    command: Sequence[str]
    model_name: str
    model: Mapping[str, str | int]
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    prefill: int
    decode: int
    rounds: int
    threads: int
    cap_bytes: int | None


def render(facts: Facts, summaries: Sequence[Summary]) -> str:
    """The whole file."""
    cap = f"{format_gb(facts.cap_bytes)} on process and page cache, cache cold at start" if facts.cap_bytes else "none"
    model = ", ".join(f"{key} {value}" for key, value in facts.model.items() if not key.endswith("_bytes"))
    lines = [
        f"# Side by side: {facts.model_name}, {facts.date}",
        "",
        f"- command: `{shlex.join(without_folders(facts.command))}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in facts.machine.items())}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in facts.versions.items())}",
        f"- model: {model}; {format_gb(int(facts.model['weight_bytes']))} of weights, "
        f"a decoded token reads {format_gb(int(facts.model['token_bytes']))}",
        f"- work: prefill {facts.prefill} ids, then {facts.decode} one at a time as given (teacher-forced); "
        f"{facts.rounds} round(s), systems in turn; {facts.threads} threads",
        f"- memory cap: {cap}",
        "",
        *table(facts, summaries),
        "",
        LEGEND,
        "",
        "## Settings",
        "",
    ]
    for summary in summaries:
        lines.append(f"- {summary.system.name}: `{json.dumps(summary.settings)}`")
    return "\n".join(lines) + "\n"


def table(facts: Facts, summaries: Sequence[Summary]) -> list[str]:
    """The table's lines."""
    ratios = decode_ratios(summaries)
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for summary in summaries:
        spread = summary.spread("decode_tok_per_s")
        speed = summary.median("decode_tok_per_s")
        read_bytes = int(facts.model["token_bytes"]) * summary.system.weight_bits / 16
        peak_bytes = summary.cgroup_peak_bytes
        ratio = ratios.get(summary.system.name)
        cells = [
            summary.system.name,
            summary.system.weights,
            number(summary.median("load_s"), 0),
            number(summary.median("prefill_tok_per_s"), 1),
            summary.failure or number(speed, 2),
            f"{number(spread[0], 2)} to {number(spread[1], 2)}" if spread else "-",
            number(summary.decode_mean_tok_per_s, 2),
            number(speed * read_bytes / 1e9 if speed else None, 1),
            format_gb(int(summary.disk_read_bytes)),
            format_gb(summary.peak_rss_bytes),
            format_gb(peak_bytes) if peak_bytes is not None else "-",
            number(summary.median("hit_rate"), 3),
            number(agreement(summary, summaries), 2),
            f"{ratio:.2f}x" if ratio else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def number(value: float | None, digits: int) -> str:
    """A number, or a dash for what is not known."""
    return "-" if value is None else f"{value:.{digits}f}"


def without_folders(command: Sequence[str]) -> list[str]:
    """Absolute paths as their last part: a result says which model, not where someone keeps it."""
    return [Path(word).name if Path(word).is_absolute() else word for word in command]
