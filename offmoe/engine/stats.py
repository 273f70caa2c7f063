"""Cost of generating, from the clock and the engine's counters: one reply, or all since the engine was loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from offmoe.core.counters import Counters
from offmoe.core.units import format_percent, format_traffic


@dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """Times in seconds. `prefill` and `decode` are the counters of the two phases.

    `prefill_s` runs to the first token, `step_s` has the time of every later token. `reused_tokens` of the prompt were
    in the KV cache already. `decode_path`: the way of the
    last token (fused, compiled, eager; empty where no token was decoded), with the reason where it is another than
    fused.
    """

    prompt_tokens: int
    reused_tokens: int = 0
    new_tokens: int
    prefill_s: float
    step_s: tuple[float, ...]
    prefill: Counters
    decode: Counters
    decode_path: str = ""
    decode_path_reason: str = ""

    @property
    def prefill_tok_per_s(self) -> float:
        """Prompt tokens read a second."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens after the first over the seconds they took, as everywhere in offmoe; 0 when there was none."""
        return tok_per_s(len(self.step_s), sum(self.step_s))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "new_tokens": self.new_tokens,
            "ttft_s": round(self.prefill_s, 4),
            "prefill_tok_per_s": round(self.prefill_tok_per_s, 3),
            "decode_tok_per_s": round(self.decode_tok_per_s, 3),
            "hit_rate": round(self.decode.hit_rate, 4),
            "hits": self.decode.hits,
            "late_hits": self.decode.late_hits,
            "misses": self.decode.misses,
            **per_token(self.decode, len(self.step_s)),
            "cpu_experts": self.decode.cpu_experts,
            "disk_stall_s": round(self.decode.disk_stall_ns / 1e9, 4),
            "prefill_disk_bytes": self.prefill.disk_bytes,
            "prefill_link_bytes": self.prefill.link_bytes,
            "decode_path": self.decode_path,
            "decode_path_reason": self.decode_path_reason,
        }

    def line(self) -> str:
        """One line for people."""
        return stats_line(self)

    def short_line(self) -> str:
        """Tokens, speed and time to the first token."""
        return " | ".join(_speed_parts(self))


@dataclass
class Totals:
    """All decoding since the engine was loaded: tokens after each reply's first, their seconds, and what they cost."""

    num_tokens: int = 0
    decode_s: float = 0.0
    decode: Counters = field(default_factory=Counters)

    def add(self, stats: GenerationStats) -> None:
        """One generation, ended in any way."""
        self.num_tokens += len(stats.step_s)
        self.decode_s += sum(stats.step_s)
        self.decode = self.decode.plus(stats.decode)

    def as_dict(self) -> dict[str, Any]:
        """Return the totals as `Engine.stats` shows them."""
        return {
            "decoded_tokens": self.num_tokens,
            "decode_tok_per_s": round(tok_per_s(self.num_tokens, self.decode_s), 3),
            "decode_hit_rate": round(self.decode.hit_rate, 4),
            **per_token(self.decode, self.num_tokens),
        }


def tok_per_s(num_tokens: int, seconds: float) -> float:
    """Tokens a second; 0 where none took any time."""
    return num_tokens / seconds if seconds else 0.0


def per_token(decode: Counters, num_tokens: int) -> dict[str, Any]:
    """Means of a decoded token: bytes by link, stall by tier, bytes fetched ahead; and what became of those.

    `prefetch_useful` and `prefetch_wasted` are shares of the bytes fetched ahead, None where there were none; what is
    neither was not decided yet. `disk_bytes_per_s`: while the drive read, None where it did not.
    """
    tokens, ahead = max(1, num_tokens), decode.ahead_bytes
    busy_ns = decode.disk_busy_ns
    return {
        "disk_bytes_per_token": round(decode.disk_bytes / tokens),
        "disk_bytes_per_s": round(decode.disk_bytes / busy_ns * 1e9) if busy_ns else None,
        "link_bytes_per_token": round(decode.link_bytes / tokens),
        "disk_stall_ms_per_token": round(decode.disk_stall_ns / 1e6 / tokens, 3),
        "link_stall_ms_per_token": round(decode.link_stall_ns / 1e6 / tokens, 3),
        "ahead_bytes_per_token": round(ahead / tokens),
        "prefetch_useful": round(min(1.0, decode.ahead_used_bytes / ahead), 4) if ahead else None,
        "prefetch_wasted": round(min(1.0, decode.ahead_wasted_bytes / ahead), 4) if ahead else None,
    }


def _speed_parts(stats: GenerationStats) -> tuple[str, str]:
    speed = f"{stats.decode_tok_per_s:.1f} tok/s" if stats.step_s else "-"
    reused = f" ({stats.reused_tokens} reused)" if stats.reused_tokens else ""
    return (
        f"{stats.new_tokens} tokens, {speed}",
        f"first token {stats.prefill_s:.2f} s for {stats.prompt_tokens} prompt tokens{reused}",
    )


def stats_line(stats: GenerationStats) -> str:
    """Cost of a reply in one line: speed, first token, hits by tier, bytes and stall by link, prefetching."""
    decode, prefill = stats.decode, stats.prefill
    mean = per_token(decode, len(stats.step_s))
    has_link = bool(prefill.link_bytes or decode.link_bytes or decode.cpu_experts)
    hits = format_percent(decode.hit_rate)
    if has_link:
        looked = decode.ram_hits + decode.ram_misses
        hits += " on the device" + (
            f", {format_percent(decode.ram_hits / looked)} of the rest in RAM" if looked else ""
        )
    parts = [
        *_speed_parts(stats),
        f"hits {hits}",
        _tier("disk", mean, prefill.disk_bytes),
    ]
    if has_link:
        parts.append(f"{_tier('link', mean, prefill.link_bytes)}; {decode.cpu_experts} misses on the CPU")
    if decode.ahead_bytes:
        parts.append(
            f"prefetch {format_traffic(mean['ahead_bytes_per_token'])}/token, {mean['prefetch_useful']:.0%} useful, "
            f"{mean['prefetch_wasted']:.0%} wasted"
        )
    if stats.decode_path and stats.step_s:
        reason = f" ({stats.decode_path_reason})" if stats.decode_path_reason else ""
        parts.append(f"decode {stats.decode_path}{reason}")
    return " | ".join(parts)


def _tier(name: str, mean: dict[str, Any], prompt_bytes: int) -> str:
    traffic, stall_ms = format_traffic(mean[f"{name}_bytes_per_token"]), mean[f"{name}_stall_ms_per_token"]
    return f"{name} {traffic}/token, {stall_ms:.1f} ms stall, {format_traffic(prompt_bytes)} for the prompt"
