"""The results of `scripts/bench simulated`, as a table and as JSON."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchlib.device_checkpoint import MadeModel
from benchlib.machine import describe_machine, describe_versions
from benchlib.report import number, without_folders

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One link speed and one number of slots."""

    ratio: float
    share: float
    link_bytes_per_s: float
    settings: dict[str, dict[str, float]]
    pairs: dict[tuple[str, str], tuple[float, float]]
    same_ids: bool
    toggled: dict[str, tuple[float, float]] = field(default_factory=dict)


def overlap(result: Result, name: str, compute_s: float) -> float:
    """A token's time over the longer of its copies and its computing; 1 is perfect. Misses on the CPU compute too."""
    row = result.settings[name]
    return 1 / row["tok_per_s"] / max(row["link_bytes"] / result.link_bytes_per_s, compute_s)


def as_json(result: Result, compute_s: float) -> dict[str, Any]:
    """One link speed and number of slots."""
    return {
        "ratio": result.ratio, "share": result.share, "link_bytes_per_s": result.link_bytes_per_s,
        "settings": {
            name: {"overlap": overlap(result, name, compute_s), **row} for name, row in result.settings.items()
        },
        "on_over_off": result.toggled,
        "speed_ratios": {f"{a} / {b}": found for (a, b), found in result.pairs.items()},
    }  # fmt: skip


HEADINGS = (
    "link / compute", "slots", "setting", "tok/s", "overlap", "hits", "late", "misses", "on the CPU", "link MB",
    "ahead MB", "of it used", "wasted",
)  # fmt: skip


def render(
    args: argparse.Namespace, model: MadeModel, compute_s: float, results: Sequence[Result], *, same: bool
) -> list[str]:
    """The result file."""
    versions = ", ".join(f"{name} {version}" for name, version in describe_versions(ROOT).items())
    command = shlex.join(["python", *without_folders(sys.argv)])
    lines = [
        f"# Prefetching and misses on a simulated link, {datetime.date.today().isoformat()}", "",
        f"- command: `{command}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in describe_machine().items())}; simulated device",
        f"- versions: {versions}",
        f"- model: {model.num_layers} layers of {model.num_experts} experts of {model.expert_bytes / 1e6:.2f} MB "
        f"(float32, random), top-{model.top_k}; slots: of the experts, on the device; all are in RAM; "
        f"{args.threads} torch thread(s)",
        f"- work: {args.blocks} blocks of {args.block} given ids in turns (A B B A), after {args.warmup} of warm-up; "
        f"all experts resident: {compute_s * 1e3:.1f} ms a token",
        "", "| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS),
    ]  # fmt: skip
    for result in results:
        for name, row in result.settings.items():
            cells = [
                f"{result.ratio:g}", f"{result.share:.0%}", name, number(row["tok_per_s"], 1),
                number(overlap(result, name, compute_s), 2),
                *(number(row[counter], 1) for counter in ("hits", "late_hits", "misses", "cpu_experts")),
                *(number(row[counter] / 1e6, 2)
                  for counter in ("link_bytes", "ahead_bytes", "ahead_used_bytes", "ahead_wasted_bytes")),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Counts and megabytes are of one decoded token. overlap: a token's time over the longer of copies "
              "and computing; 1.00 is perfect, and misses computed on the CPU are not in it.", ""]  # fmt: skip
    for result in results:
        for (a, b), (whole, median) in result.pairs.items():
            place = f"link / compute {result.ratio:g}, {result.share:.0%}"
            lines.append(f"- {place}: {a} over {b}: {whole:.3f}x, by block {median:.3f}x")
        for name, (speed, error) in result.toggled.items():
            place = f"link / compute {result.ratio:g}, {result.share:.0%}"
            lines.append(f"- {place}: {name}, one engine, on over off: {speed:.3f}x (+- {error:.3f})")
    if args.toggle:
        return lines
    return [*lines, f"- ids with and without prefetching: {'equal' if same else 'DIFFERENT'}"]
