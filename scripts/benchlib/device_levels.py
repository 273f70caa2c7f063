"""One model at one VRAM size: peak memory, prefill and decode of offmoe's settings and of its peers, in turns.

The first setting runs alone until its peak is read, since peaks are of the whole process. Then all systems are open at
once and decode the same stretches of text in turns, forwards and backwards (A B C, C B A): what drifts hits all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from benchlib.device_checkpoint import MadeModel
from benchlib.device_systems import OffloadedSystem, OffmoeSystem, Place, System, Timed, release_device
from benchlib.ledger import Ledger, TimeIsUpError
from benchlib.roofline import Bandwidths, TokenBytes, decode_bound, prefill_bound

# The first one is what the others are compared with.
SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {},
    "prefetch off": {"prefetch": "off"},
    "miss stream": {"miss": "stream"},
    "miss cpu": {"miss": "cpu"},
    "compiled": {"compile": "on"},
}
ROUNDING_BYTES = 64 << 20  # what a budget may be above the plan that it was taken from
RAM_BESIDE_BYTES = 8 << 30  # libraries, staging, weights on their way to the device
FIRST_GUESS_BYTES = 4 << 30  # KV cache, workspace and context beside weights, until an engine has said what it planned


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much is run."""

    prompts: tuple[int, ...] = (512, 4096)
    decode_prompt: int = 32
    decode_block: int = 32
    warmup: int = 24
    rounds: int = 2


@dataclass(kw_only=True)
class Bench:
    """What every level needs. `fixed_bytes` is what an engine planned beside expert slots, once known."""

    ledger: Ledger
    place: Place
    speeds: Bandwidths
    ids: Sequence[int]
    work: Work
    options: dict[str, Any] = field(default_factory=dict)
    fixed_bytes: dict[str, int] = field(default_factory=dict)
    load_s: float = 5.0  # the longest load and warm-up so far: less time than that is left for no other


@dataclass(frozen=True, kw_only=True)
class Level:
    """A model with device slots for `share` of its experts."""

    name: str
    model: MadeModel
    share: float

    @property
    def slots(self) -> int:
        """Device slots."""
        return max(self.model.top_k, round(self.share * self.model.routed_experts))

    @property
    def token(self) -> TokenBytes:
        """What a decoded token reads."""
        model = self.model
        return TokenBytes(
            dense_bytes=model.resident_bytes - model.embedding_bytes, expert_bytes=model.expert_bytes,
            num_layers=model.num_layers, top_k=model.top_k,
        )  # fmt: skip

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name} {self.share:.0%}"

    @property
    def keys(self) -> dict[str, Any]:
        """For records."""
        return {"model": self.name, "share": self.share}


def run_level(
    bench: Bench, level: Level, settings: Sequence[str], peers: Callable[[int], Sequence[System]] | None = None
) -> None:
    """Measure all; `peers(vram_bytes)` are opened last. A system that fails to open is recorded and left out."""
    vram_bytes = level_vram(bench, level)
    with _closing_all() as systems:
        with suppress(TimeIsUpError):
            for name in settings:
                with bench.ledger.step(f"{level.title} {name}: load", needs_s=bench.load_s):
                    left_s = bench.ledger.left_s
                    systems.append(_open(bench, level, name, vram_bytes))
                    _warm_up(bench, systems[-1])
                    bench.load_s = max(bench.load_s, left_s - bench.ledger.left_s)
                    if len(systems) == 1:
                        _measure_alone(bench, level, systems[0], vram_bytes)
            if peers is not None:
                with bench.ledger.step(f"{level.title} peers: load", needs_s=bench.load_s):
                    for peer in peers(vram_bytes):
                        systems.append(peer)
                        peer.run(bench.ids[: bench.work.decode_prompt + 2], num_prompt=bench.work.decode_prompt)
        _decode(bench, level, systems)
        with suppress(TimeIsUpError):
            _prefill(bench, level, systems)


def level_vram(bench: Bench, level: Level) -> int:
    """The budget for this many slots: what an engine planned beside slots, else a guess that leaves room."""
    slot_bytes = -(-level.model.expert_bytes // 256) * 256
    guess = level.model.resident_bytes + min(FIRST_GUESS_BYTES, 64 * level.model.all_experts_bytes)
    return level.slots * slot_bytes + bench.fixed_bytes.get(level.name, guess)


@contextmanager
def _closing_all() -> Iterator[list[System]]:
    systems: list[System] = []
    try:
        yield systems
    finally:
        while systems:
            systems.pop().close()
        release_device()


def _open(bench: Bench, level: Level, name: str, vram_bytes: int) -> OffmoeSystem:
    context = max(bench.work.prompts) + bench.work.decode_block + 8
    options = {"compile": "off", **bench.options, **SETTINGS[name]}
    system = OffmoeSystem(
        name, level.model, bench.place, vram=vram_bytes, expert_slots=level.slots, context_length=context,
        ram=level.model.all_experts_bytes * 21 // 20 + RAM_BESIDE_BYTES, **options,
    )  # fmt: skip
    bench.ledger.add("loaded", **level.keys, setting=name, vram_bytes=vram_bytes, load_s=system.load_s)
    return system


def _warm_up(bench: Bench, system: System) -> None:
    """The longest prompt brings every expert to RAM, the tokens after it settle caches, scheduler and compiler."""
    longest = max(bench.work.prompts)
    system.run(bench.ids[: longest + bench.work.warmup], num_prompt=longest)


def _measure_alone(bench: Bench, level: Level, system: System, vram_bytes: int) -> None:
    """Peak memory after the longest prompt, and the plan, from which other levels' budgets follow."""
    assert isinstance(system, OffmoeSystem)
    plan = system.engine.plan.device
    assert plan is not None, "an engine without a device"
    on_cuda = torch.cuda.is_available()
    peak = system.engine.stats()["device_peak_bytes"] if on_cuda else None
    free_bytes, total_bytes = torch.cuda.mem_get_info() if on_cuda else (0, 0)
    bench.ledger.add(
        "memory", **level.keys, vram_bytes=vram_bytes, planned_bytes=plan.total_bytes, device_slots=plan.num_slots,
        allocated_bytes=torch.cuda.max_memory_allocated() if on_cuda else None, peak_bytes=peak,
        driver_used_bytes=total_bytes - free_bytes if on_cuda else None, ok=peak is None or peak <= vram_bytes,
    )  # fmt: skip
    bench.fixed_bytes[level.name] = plan.fixed_bytes + ROUNDING_BYTES


def _prefill(bench: Bench, level: Level, systems: list[System]) -> None:
    for num_prompt in bench.work.prompts:
        for system in list(systems):
            with bench.ledger.step(f"{level.title} {system.name}: prefill {num_prompt}"):
                runs = [system.run(bench.ids[:num_prompt], num_prompt=num_prompt) for _ in range(2)]
                run = min(runs, key=lambda run: run.prefill_s)
                link_bytes = run.prefill_counts.get("link_bytes", 0)
                bound = prefill_bound(level.token, bench.speeds, num_tokens=num_prompt, link_bytes=link_bytes)
                bench.ledger.add(
                    "prefill", **level.keys, setting=system.name, tokens=num_prompt,
                    tok_per_s=num_prompt / run.prefill_s, link_bytes=link_bytes,
                    link_share=bound.link_s / run.prefill_s, bound_tok_per_s=num_prompt / bound.seconds,
                    roofline_share=bound.seconds / run.prefill_s, limit=bound.limit, counts=run.prefill_counts,
                )  # fmt: skip


def _decode(bench: Bench, level: Level, systems: list[System]) -> None:
    """Rounds forwards and backwards, each pair on another stretch of text; what was run when time is up counts."""
    runs: dict[str, list[Timed]] = {system.name: [] for system in systems}
    with suppress(TimeIsUpError):
        for round_idx in range(2 * bench.work.rounds):
            for system in systems[:: 1 if round_idx % 2 == 0 else -1]:
                with bench.ledger.step(f"{level.title} {system.name}: decode"):
                    ids = _stretch(bench, round_idx // 2, few=isinstance(system, OffloadedSystem))
                    runs[system.name].append(system.run(ids, num_prompt=bench.work.decode_prompt))
    for system in systems:
        if runs[system.name] and runs[systems[0].name]:
            _record_decode(bench, level, system, runs[system.name], runs[systems[0].name])


def _stretch(bench: Bench, idx: int, *, few: bool) -> Sequence[int]:
    """Ids of a round. A system that takes seconds a token gets `few`."""
    size = bench.work.decode_prompt + bench.work.decode_block
    begin = idx * size % max(1, len(bench.ids) - size)
    return bench.ids[begin : begin + (bench.work.decode_prompt + 3 if few else size)]


def _record_decode(bench: Bench, level: Level, system: System, runs: list[Timed], first: list[Timed]) -> None:
    token_s = statistics.median(seconds for run in runs for seconds in run.decode_s)
    num_tokens = sum(len(run.decode_s) for run in runs)
    record: dict[str, Any] = {
        "tok_per_s": 1 / token_s, "num_tokens": num_tokens,
        "speed_to_first": statistics.median(a.token_s / b.token_s for a, b in zip(first, runs, strict=False)),
    }  # fmt: skip
    counts = {name: sum(run.decode_counts[name] for run in runs) for name in runs[0].decode_counts}
    if counts:
        lookups = counts["hits"] + counts["late_hits"] + counts["misses"]  # none are counted when all are resident
        # What would have had to move whatever was fetched ahead: misses, and what was fetched ahead and used.
        moved = counts["misses"] + counts["ahead_used_bytes"] / level.model.expert_bytes
        kept = min(1.0, max(0.0, 1 - moved / max(1, lookups)))
        bound = decode_bound(level.token, bench.speeds, hit_rate=kept, miss=SETTINGS[system.name].get("miss", "auto"))
        record |= {
            "hit_rate": counts["hits"] / lookups if lookups else 1.0, "kept_rate": kept,
            "link_bytes_per_token": counts["link_bytes"] / num_tokens,
            "cpu_experts_per_token": counts["cpu_experts"] / num_tokens, "bound_tok_per_s": bound.tok_per_s,
            "limit": bound.limit, "roofline_share": bound.seconds / token_s, "counts": counts,
        }  # fmt: skip
    if isinstance(system, OffmoeSystem):
        stats = system.engine.stats()
        record["state"] = {
            name: stats[name] for name in ("prefetch", "miss_chosen", "kernels", "notes") if name in stats
        }
    bench.ledger.add("decode", **level.keys, setting=system.name, **record)
