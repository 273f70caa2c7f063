"""The rows of `offmoe bench` for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offmoe.core.units import format_bytes, format_percent, format_seconds, format_traffic


def bench_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of a record of `run_bench`."""
    settings = record["settings"]
    path = record["decode_path"] + (f": {reason}" if (reason := record["decode_path_reason"]) else "")
    rows = [
        ("load", format_seconds(record["load_s"])),
        ("prompt", f"{record['prefill_tok_per_s']:.1f} tok/s, first token after {format_seconds(record['ttft_s'])}"),
        ("decode", f"{record['decode_tok_per_s']:.1f} tok/s ({path})"),
        ("hits", f"{format_percent(record['hit_rate'])}, {record['experts_cached']} of {record['experts_total']} "
                 "experts in slots"),
        ("from disk", f"{format_traffic(record['disk_bytes_per_token'])} a token, "
                      f"{record['disk_stall_ms_per_token']:.1f} ms waited"),
    ]  # fmt: skip
    if record["link_bytes_per_token"]:
        rows.append(("over the link", f"{format_traffic(record['link_bytes_per_token'])} a token"))
    rows += [
        ("memory", f"peak {format_bytes(record['peak_rss_growth_bytes'])}, planned "
                   f"{format_bytes(record['planned_bytes'])}, budget {format_bytes(settings['ram_bytes'])}"),
        ("with", f"{settings['device']}, {', '.join(settings['cpu_kernels'])}, {settings['dtype']}, offmoe "
                 f"{settings['offmoe']}, torch {settings['torch']}, transformers {settings['transformers']}"),
    ]  # fmt: skip
    return rows
