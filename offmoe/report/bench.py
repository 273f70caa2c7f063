"""`offmoe bench`: the loop of `generate`, timed, on given ids, so that two systems do the same work."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers

import offmoe
from offmoe.base.errors import UsageError
from offmoe.base.machine import num_cores
from offmoe.generation.engine import Engine
from offmoe.generation.stats import GenerationStats


def run_bench(
    open_engine: Callable[[], Engine], ids: Sequence[int], *, prefill: int, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Load, read ids[:prefill] at once, then decode ids[prefill:] one at a time as given; returns the JSON record.

    Decode speed is one over the median time of a token. Counters cover the decode phase alone.
    """
    if not 0 < prefill < len(ids) - 1:
        raise UsageError(
            f"--prefill {prefill} leaves {len(ids) - prefill} of {len(ids)} ids to decode; at least 2 needed"
        )
    begin = time.perf_counter()
    with open_engine() as engine:
        load_s = time.perf_counter() - begin
        stats = _teacher_forced(engine, ids, prefill, progress)
        return {"load_s": round(load_s, 3), **stats.as_dict(), **_record(engine)}


def _teacher_forced(
    engine: Engine, ids: Sequence[int], prefill: int, progress: Callable[[str, int, int], None]
) -> GenerationStats:
    given: Iterator[int] = iter(ids[prefill:])
    total = len(ids) - prefill
    done = 0
    pieces = engine.stream(
        list(ids[:prefill]), max_new_tokens=total, choose=lambda _, __: next(given), ignore_end=True,
        on_prefill=lambda done, total: progress("prefill", done, total),
    )  # fmt: skip
    for piece in pieces:
        done += piece.token_id is not None
        progress("decode", done, total)
        if piece.stats is not None:
            return piece.stats
    raise AssertionError("the stream ended without statistics")


def _record(engine: Engine) -> dict[str, Any]:
    totals = engine.stats()
    return {
        "peak_rss_growth_bytes": totals["peak_rss_growth_bytes"],
        "planned_bytes": totals["planned_bytes"],
        "experts_cached": totals["experts_cached"],
        "experts_total": totals["experts_total"],
        "disk_bytes": totals["disk_bytes"],
        "settings": {
            **engine.config.as_dict(),
            "io_used": totals["io"],
            "ram_bytes": totals["ram_bytes"],
            "context_tokens": engine.context_length,
            "prefill_chunk_used": engine.plan.prefill_chunk,
            "dtype": str(engine.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "cores": num_cores(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "offmoe": offmoe.__version__,
        },
    }
