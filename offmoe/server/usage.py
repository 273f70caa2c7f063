"""Counts and times of a finished request, for the fields `usage` and `timings` of each API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offmoe.server.events import ReplyEnd


def openai_usage(num_prompt: int, ends: Sequence[ReplyEnd]) -> dict[str, Any]:
    """OpenAI's `usage` of a request whose replies ended with `ends`."""
    generated = sum(end.num_tokens for end in ends)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": generated,
        "total_tokens": num_prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached_tokens(ends)},
        "completion_tokens_details": {"reasoning_tokens": sum(end.num_reasoning for end in ends)},
    }


def cached_tokens(ends: Sequence[ReplyEnd]) -> int:
    """Tokens of the prompt that were not read again, for the first reply."""
    first = next((end.stats for end in ends if end.stats is not None), None)
    return 0 if first is None else first.reused_tokens


def timings(end: ReplyEnd) -> dict[str, Any] | None:
    """llama-server's `timings` of one reply, with the cost in experts."""
    stats = end.stats
    if stats is None:
        return None
    read, decoded = stats.prompt_tokens - stats.reused_tokens, len(stats.step_s)
    prompt_ms, decode_ms = stats.prefill_s * 1e3, sum(stats.step_s) * 1e3
    cost = stats.as_dict()
    return {
        "cache_n": stats.reused_tokens,
        "prompt_n": read,
        "prompt_ms": round(prompt_ms, 3),
        "prompt_per_token_ms": round(prompt_ms / read, 3) if read else 0.0,
        "prompt_per_second": round(stats.prefill_tok_per_s, 3),
        "predicted_n": stats.new_tokens,
        "predicted_ms": round(decode_ms, 3),
        "predicted_per_token_ms": round(decode_ms / decoded, 3) if decoded else 0.0,
        "predicted_per_second": round(stats.decode_tok_per_s, 3),
        "queue_ms": round(end.queue_s * 1e3, 3),
        "hit_rate": cost["hit_rate"],
        "disk_bytes_per_token": cost["disk_bytes_per_token"],
        "decode_path": stats.decode_path,
    }
