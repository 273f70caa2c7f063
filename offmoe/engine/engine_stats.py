"""Statistics of an engine since it was loaded, in one dictionary."""

from __future__ import annotations

from typing import Any

from offmoe.decode.compiled import DecodeCompiler
from offmoe.decode.paths import DecodePaths
from offmoe.engine.stats import Totals
from offmoe.hf.device_failures import peak_bytes
from offmoe.kv.prefix import KeptCache
from offmoe.loader.loaded import LoadedModel
from offmoe.machine.memory import peak_rss_bytes


def engine_stats(
    parts: LoadedModel, kept: KeptCache, decoded: Totals, decode: DecodeCompiler | DecodePaths, *, baseline_bytes: int
) -> dict[str, Any]:
    """Statistics for `Engine.stats`. `baseline_bytes`: what the process held before it grew by the model."""
    cache, plan, device = parts.cache, parts.plan, parts.device
    serving = parts.serving.stats()  # first: it reads the stalls that the counters are to have
    totals: dict[str, Any] = {
        **cache.counters.as_dict(),
        **decoded.as_dict(),
        "hit_rate": cache.counters.hit_rate,
        "experts_cached": cache.num_slots,
        "experts_total": plan.num_experts,
        "io": "direct" if parts.disk.direct else "buffered",
        "prefilled_tokens": kept.num_prefilled,
        "reused_tokens": kept.num_reused,
        "compile": decode.state,
        "decode_path": decode.path,
        "decode_path_reason": decode.reason,
        **serving,
        "ram_bytes": plan.ram_bytes,
        "planned_bytes": plan.total_bytes,
        "peak_rss_growth_bytes": max(0, peak_rss_bytes() - baseline_bytes),
    }
    if device is not None and plan.device is not None:
        totals |= {
            "device": device.name, "device_slots": plan.device.num_slots, "vram_bytes": plan.device.vram_bytes,
            "device_planned_bytes": plan.device.total_bytes, "device_peak_bytes": peak_bytes(device),
            "device_driver_bytes": device.driver_bytes(),
        }  # fmt: skip
    return totals
