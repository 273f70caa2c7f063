"""Statistics of an engine since it was loaded, in one record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from offmoe.decode.compiled import DecodeCompiler
from offmoe.decode.paths import DecodePaths
from offmoe.engine.stats import Totals
from offmoe.hf.device_failures import peak_bytes
from offmoe.kv.prefix import PrefixCache
from offmoe.loader.loaded import LoadedModel
from offmoe.machine.memory import peak_rss_bytes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EngineStats(Mapping[str, Any]):
    """Totals since load, also as a mapping from names to values. Units are in the names.

    First the counters, as `core.counters.Counters` explains them; then means over all tokens decoded, None for a rate
    of something that did not happen; then settings in force, memory, and what only engines on a device have. Fields
    that do not apply are None and not in the mapping.
    """

    hits: int
    late_hits: int
    misses: int
    ram_hits: int
    ram_misses: int
    evictions: int
    disk_reads: int
    disk_bytes: int
    disk_busy_ns: int
    disk_stall_ns: int
    link_stall_ns: int
    link_copies: int
    link_bytes: int
    cpu_experts: int
    ahead_bytes: int
    ahead_used_bytes: int
    ahead_wasted_bytes: int
    compute_ns: int
    layer_calls: int
    waiting_calls: int
    syncs: int
    decoded_tokens: int
    decode_tok_per_s: float
    decode_hit_rate: float
    disk_bytes_per_token: int
    disk_bytes_per_s: int | None
    link_bytes_per_token: int
    disk_stall_ms_per_token: float
    link_stall_ms_per_token: float
    ahead_bytes_per_token: int
    prefetch_useful: float | None
    prefetch_wasted: float | None
    hit_rate: float
    experts_cached: int
    experts_total: int
    io: Literal["direct", "buffered"]
    prefilled_tokens: int
    reused_tokens: int
    kept_prompts: dict[str, int] | None = None
    compile: str
    decode_path: str
    decode_path_reason: str
    prefetch: dict[str, Any] | Literal["off"]
    policy: str
    policy_switches: int | None = None
    policy_sample_bytes: dict[str, int] | None = None
    ram_evictions: int | None = None
    ram_policy: str | None = None
    ram_policy_switches: int | None = None
    ram_policy_sample_bytes: dict[str, int] | None = None
    miss: str | None = None
    miss_chosen: str | None = None
    kernels: list[str] | str | None = None
    cpu_kernels: list[str]
    pack: str
    wide_experts: int | None = None
    notes: list[str] | None = None
    ram_bytes: int
    planned_bytes: int
    peak_rss_growth_bytes: int
    device: str | None = None
    device_slots: int | None = None
    vram_bytes: int | None = None
    device_planned_bytes: int | None = None
    device_peak_bytes: int | None = None  # None on a device that does not count it
    device_driver_bytes: int | None = None
    predicted: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Name to value, for JSON, without fields that do not apply."""
        found = {}
        for field in fields(self):
            value = getattr(self, field.name)
            is_of_device = field.name.startswith("device_") and self.device is not None
            if value is not None or field.default is MISSING or is_of_device:
                found[field.name] = value
        return found

    def __getitem__(self, name: str) -> Any:
        return self.as_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.as_dict())

    def __len__(self) -> int:
        return len(self.as_dict())


def engine_stats(
    parts: LoadedModel, kept: PrefixCache, decoded: Totals, decode: DecodeCompiler | DecodePaths, *,
    baseline_bytes: int, predicted: dict[str, float] | None,
) -> EngineStats:  # fmt: skip
    """Statistics for `Engine.stats`. `baseline_bytes`: what the process held before it grew by the model."""
    cache, plan, device = parts.cache, parts.plan, parts.device
    serving = parts.serving.stats()  # first: it reads the stalls that the counters are to have
    on_device: dict[str, Any] = {}
    if device is not None and plan.device is not None:
        on_device = {
            "device": device.name, "device_slots": plan.device.num_slots, "vram_bytes": plan.device.vram_bytes,
            "device_planned_bytes": plan.device.total_bytes, "device_peak_bytes": peak_bytes(device),
            "device_driver_bytes": device.driver_bytes(),
        }  # fmt: skip
    return EngineStats(
        **{**cache.counters.as_dict(), **decoded.as_dict(), **serving},
        hit_rate=cache.counters.hit_rate, experts_cached=cache.num_slots, experts_total=plan.num_experts,
        io="direct" if parts.disk.direct else "buffered", prefilled_tokens=kept.num_prefilled,
        reused_tokens=kept.num_reused,
        kept_prompts=None if kept.keeper is None else kept.keeper.as_dict(), compile=decode.state,
        decode_path=decode.path, decode_path_reason=decode.reason,
        ram_bytes=plan.ram_bytes, planned_bytes=plan.total_bytes,
        peak_rss_growth_bytes=max(0, peak_rss_bytes() - baseline_bytes), **on_device,
        predicted=None if predicted is None else dict(predicted),
    )  # fmt: skip
