"""`offmoe bench`: the loop of `generate`, timed, on given ids, so that two systems do the same work."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import offmoe
from offmoe.core.errors import ContextLengthError, UsageError
from offmoe.engine.engine import Engine
from offmoe.engine.prompt import check_ids
from offmoe.engine.stats import GenerationStats
from offmoe.hf.door import transformers_version
from offmoe.machine.memory import num_cores

# In the record where there is a device.
_DEVICE_TOTALS = ("device", "device_slots", "vram_bytes", "device_planned_bytes", "device_peak_bytes", "link_bytes")


def run_bench(
    open_engine: Callable[[], Engine], choose_ids: Callable[[Engine], Sequence[int]], *, prefill: int, warm: bool,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """Load, read ids[:prefill] at once, then decode ids[prefill:] one at a time as given; returns the JSON record.

    Decode speed is one over the median time of a token. Counters cover the decode phase alone, of the second time where
    `warm` has all of it done once before.
    """
    begin = time.perf_counter()
    with open_engine() as engine:
        load_s = time.perf_counter() - begin
        ids = _check(engine, choose_ids(engine), prefill)
        if warm:
            _teacher_forced(engine, ids, prefill, progress)
        stats = _teacher_forced(engine, ids, prefill, progress)
        decode_s = [round(seconds, 5) for seconds in stats.step_s]
        record = _record(engine)
        record["settings"]["warm"] = warm
        return {"load_s": round(load_s, 3), **stats.as_dict(), **record, "decode_s": decode_s}


def _check(engine: Engine, ids: Sequence[int], prefill: int) -> list[int]:
    """All ids must be real tokens and have room, or the run would not be the work that was asked for."""
    if prefill > len(ids) - 2:
        raise UsageError(
            f"--prefill {prefill} of {len(ids)} ids leaves {max(0, len(ids) - prefill)} to decode; at least 2 needed"
        )
    if len(ids) > engine.context_length:
        raise ContextLengthError(
            f"there are {len(ids)} ids, the context has room for {engine.context_length}; give fewer or raise "
            "--context-length"
        )
    return check_ids(ids, vocab_size=engine.vocab_size)


def _teacher_forced(
    engine: Engine, ids: Sequence[int], prefill: int, progress: Callable[[str, int, int], None]
) -> GenerationStats:
    given: Iterator[int] = iter(ids[prefill:])
    total = len(ids) - prefill
    done = 0
    chunks = engine.stream(
        list(ids[:prefill]), max_new_tokens=total, choose=lambda _, __: next(given), ignore_eos=True,
        on_prefill=lambda done, total: progress("prefill", done, total), reuse=False,
    )  # fmt: skip
    for chunk in chunks:
        done += len(chunk.token_ids)
        progress("decode", done, total)
        if chunk.stats is not None:
            return chunk.stats
    raise AssertionError("the stream ended without statistics")


def _record(engine: Engine) -> dict[str, Any]:
    totals = engine.stats()
    return {
        "peak_rss_growth_bytes": totals.peak_rss_growth_bytes,
        "planned_bytes": totals.planned_bytes,
        "experts_cached": totals.experts_cached,
        "experts_total": totals.experts_total,
        "disk_bytes": totals.disk_bytes,
        **{name: totals[name] for name in (*_DEVICE_TOTALS, "predicted") if name in totals},
        "settings": {
            **engine.config.as_dict(),
            "io_used": totals.io,
            "ram_bytes": totals.ram_bytes,
            "context_tokens": engine.context_length,
            "prefill_chunk_used": engine.plan.prefill_chunk,
            "dtype": str(engine.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "cpu_kernels": totals.cpu_kernels,
            "cores": num_cores(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers_version(),
            "offmoe": offmoe.__version__,
        },
    }
