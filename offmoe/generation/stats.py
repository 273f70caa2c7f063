"""What one generation cost, from the clock and the engine's counters."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from offmoe.base.counters import Counters
from offmoe.base.units import format_percent, format_traffic


@dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """Times in seconds. `prefill` and `decode` are the counters of the two phases.

    `prefill_s` runs to the first token, `step_s` has the time of every later token. `reused_tokens` of the prompt were
    in the KV cache already.
    """

    prompt_tokens: int
    reused_tokens: int = 0
    new_tokens: int
    prefill_s: float
    step_s: tuple[float, ...]
    prefill: Counters
    decode: Counters

    @property
    def prefill_tok_per_s(self) -> float:
        """Prompt tokens read a second."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_per_s(self) -> float:
        """One over the median time of a token after the first; 0 when there was none."""
        return 1 / statistics.median(self.step_s) if self.step_s else 0.0

    @property
    def disk_bytes_per_token(self) -> float:
        """Mean bytes read from disk for a token after the first."""
        return self.decode.disk_bytes / len(self.step_s) if self.step_s else 0.0

    @property
    def link_bytes_per_token(self) -> float:
        """Mean bytes copied to the device for a token after the first; 0 without a device."""
        return self.decode.link_bytes / len(self.step_s) if self.step_s else 0.0

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
            "misses": self.decode.misses,
            "disk_bytes_per_token": round(self.disk_bytes_per_token),
            "link_bytes_per_token": round(self.link_bytes_per_token),
            "cpu_experts": self.decode.cpu_experts,
            "disk_stall_s": round(self.decode.disk_stall_ns / 1e9, 4),
            "prefill_disk_bytes": self.prefill.disk_bytes,
            "prefill_link_bytes": self.prefill.link_bytes,
        }

    def line(self) -> str:
        """One line for people."""
        decode = f"{self.decode_tok_per_s:.1f} tok/s" if self.step_s else "-"
        link = ""
        if self.prefill.link_bytes or self.decode.link_bytes or self.decode.cpu_experts:
            link = (
                f" | link {format_traffic(self.link_bytes_per_token)}/token, "
                f"{format_traffic(self.prefill.link_bytes)} for the prompt; {self.decode.cpu_experts} misses on the CPU"
            )
        reused = f" ({self.reused_tokens} reused)" if self.reused_tokens else ""
        per_token, prompt = format_traffic(self.disk_bytes_per_token), format_traffic(self.prefill.disk_bytes)
        return (
            f"{self.new_tokens} tokens, {decode} | first token {self.prefill_s:.2f} s for {self.prompt_tokens} prompt "
            f"tokens{reused} | hits {format_percent(self.decode.hit_rate)} | disk {per_token}/token, {prompt} for the "
            f"prompt{link}"
        )
