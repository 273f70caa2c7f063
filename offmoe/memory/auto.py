""" "auto" settled: one pure function from what the user set, and facts, to a complete config with a reason for each.

`offmoe plan` shows the result and the loader runs by it. What the user fixed stays, or is refused with the reason.
Three settings are complete as "auto": policy, miss and prefetch are decided by measuring while the engine runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from offmoe.core.config import EngineConfig
from offmoe.core.errors import UsageError
from offmoe.core.units import format_bytes
from offmoe.memory.budget import MIN_VRAM_RESERVE_BYTES, auto_ram, auto_vram, ram_reserve

DEFAULT_CONTEXT_LENGTH = 4096
_SET = "as set"


@dataclass(frozen=True, kw_only=True)
class AutoFacts:
    """Facts that settle "auto". None: not known yet, and what depends on it stays open.

    `may_compile`: steps of this model on the device; `longest_context` the model's own; `ram_bytes` and `vram_bytes`
    free, and with `total` all there is, used or not; `direct_reads`: the file system has them; `packs`: the
    processor is faster with packed weights.
    """

    has_device: bool
    may_compile: bool = True
    longest_context: int | None = None
    ram_bytes: int | None = None
    vram_bytes: int | None = None
    direct_reads: bool | None = None
    total_ram_bytes: int | None = None
    total_vram_bytes: int | None = None
    packs: bool = False


@dataclass(frozen=True, kw_only=True)
class Complete:
    """A config without open settings, and why each is what it is."""

    config: EngineConfig
    reasons: dict[str, str]


def complete_config(config: EngineConfig, facts: AutoFacts) -> Complete:
    """Settle every "auto" of `config`. Raises UsageError for settings that contradict the facts or each other."""
    values: dict[str, object] = {}
    reasons: dict[str, str] = {}

    def settle(name: str, value: object, reason: str) -> None:
        given = getattr(config, name)
        is_open = given in (None, "auto")
        values[name] = value if is_open else given
        reasons[name] = reason if is_open else _SET

    on_device = config.device != "cpu" and (config.device != "auto" or facts.has_device or config.vram is not None)
    _refuse_contradictions(config, on_device=on_device)
    _refuse_more_than_there_is("ram", config.ram, facts.total_ram_bytes)
    _refuse_more_than_there_is("vram", config.vram, facts.total_vram_bytes)
    settle("device", "cuda" if on_device else "cpu", _why_device(config, facts))
    settle("context_length", _context(facts), _why_context(facts))
    _refuse_long_context(config, facts)
    if facts.ram_bytes is not None:
        reserve = format_bytes(ram_reserve(facts.ram_bytes))
        settle("ram", auto_ram(facts.ram_bytes), f"{format_bytes(facts.ram_bytes)} free, {reserve} left to the system")
    if on_device and facts.vram_bytes is not None:
        reserve = format_bytes(max(MIN_VRAM_RESERVE_BYTES, facts.vram_bytes // 16))
        settle("vram", auto_vram(facts.vram_bytes), f"{format_bytes(facts.vram_bytes)} free, {reserve} left to others")
    if facts.direct_reads is not None:
        direct = ("direct", "the file system has direct reads")
        settle("io", *(direct if facts.direct_reads else ("buffered", "the file system has no direct reads")))
    if on_device and facts.may_compile and not config.placement_invariant:
        settle("compile", "auto", "on the device, in the background")
    elif on_device and facts.may_compile:
        settle("compile", "off", "rounding must not change on the way")
    else:
        settle("compile", "off", "not for this model or device" if on_device else "gains nothing on the CPU")
    if config.placement_invariant:
        settle("miss", "stream", "every expert is computed in one place")
    else:
        settle(
            "miss", "auto", "link and CPU are measured at load" if on_device else "RAM is where experts are computed"
        )
    settle("prefetch", "auto", "on while it saves time, compared with doing nothing")
    settle("policy", "auto", "chosen while it runs")
    return Complete(config=replace(config, **values), reasons=reasons)  # type: ignore[arg-type]


def _refuse_contradictions(config: EngineConfig, *, on_device: bool) -> None:
    if on_device and config.placement_invariant and config.miss == "cpu":
        raise UsageError(
            "miss is cpu and placement_invariant computes every expert on the device; leave out one of the two"
        )


def _refuse_more_than_there_is(name: str, given_bytes: int | None, total_bytes: int | None) -> None:
    if given_bytes is not None and total_bytes is not None and given_bytes > total_bytes:
        raise UsageError(
            f"{name} is {format_bytes(given_bytes)}, the machine has {format_bytes(total_bytes)} in all; "
            f"lower --{name}, or leave it out"
        )


def _refuse_long_context(config: EngineConfig, facts: AutoFacts) -> None:
    longest = facts.longest_context
    if longest is not None and config.context_length is not None and config.context_length > longest:
        raise UsageError(
            f"context_length is {config.context_length}, the model was made for {longest}; "
            f"use --context-length {longest}"
        )


def _context(facts: AutoFacts) -> int:
    return min(DEFAULT_CONTEXT_LENGTH, facts.longest_context or DEFAULT_CONTEXT_LENGTH)


def _why_context(facts: AutoFacts) -> str:
    if facts.longest_context is not None and facts.longest_context < DEFAULT_CONTEXT_LENGTH:
        return "the model's own limit"
    return f"the default; the model takes {facts.longest_context or 'any number of'} tokens"


def _why_device(config: EngineConfig, facts: AutoFacts) -> str:
    if facts.has_device:
        return "there is one"
    return "vram is set" if config.vram is not None else "there is no CUDA device"
