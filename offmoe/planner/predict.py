"""Prediction of a plan's speed: bytes over measured bandwidths, in steps that a person can redo."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from offmoe.machine.record import DriveSpeed, LayerCosts, MachineRecord
from offmoe.memory.budget import MemoryPlan
from offmoe.planner.hit_rates import HitCurve
from offmoe.planner.layer_costs import latent_work, layer_cost
from offmoe.planner.model_facts import ModelFacts

# A token's multiplications are two operations a weight.
_FLOPS_A_WEIGHT = 2


@dataclass(frozen=True, kw_only=True)
class SpeedStep:
    """A part of a token's or a prompt's time. `rate` in bytes (or `unit`) a second; seconds below 0 are saved."""

    what: str
    amount: float
    rate: float
    seconds: float
    unit: str = "bytes"


@dataclass(frozen=True, kw_only=True)
class SpeedPrediction:
    """Times of one decoded token at half of the context, and of a prompt of `prompt_tokens` on an empty cache."""

    decode_steps: tuple[SpeedStep, ...]
    decode_tok_per_s: float
    prompt_steps: tuple[SpeedStep, ...]
    prompt_tokens: int
    ttft_s: float
    hit_rate: float
    ram_hit_rate: float
    hit_source: str


def predict(
    facts: ModelFacts, plan: MemoryPlan, record: MachineRecord, curve: HitCurve, *, drive: DriveSpeed, direct: bool,
    prompt_tokens: int, context_length: int,
) -> SpeedPrediction:  # fmt: skip
    """Decode is the sum of its steps: what overlaps is one step at the rate of both."""
    disk = (drive.direct_bytes_per_s if direct else None) or drive.buffered_bytes_per_s or drive.direct_bytes_per_s
    assert disk is not None, f"{drive=}"
    hit_rate = curve.at(plan.computing_slots)
    ram_rate = max(hit_rate, curve.at(min(plan.num_experts, plan.num_slots)))
    if plan.device is None:
        decode = _decode_on_cpu(facts, plan, record, hit_rate, disk, context_length // 2)
    else:
        decode = _decode_on_device(facts, plan, record, hit_rate, ram_rate, disk)
    prompt = _prompt(facts, plan, record, disk, prompt_tokens)
    return SpeedPrediction(
        decode_steps=decode, decode_tok_per_s=1 / sum(step.seconds for step in decode), prompt_steps=prompt,
        prompt_tokens=prompt_tokens, ttft_s=sum(step.seconds for step in prompt), hit_rate=hit_rate,
        ram_hit_rate=ram_rate, hit_source=curve.source,
    )  # fmt: skip


def _decode_on_cpu(
    facts: ModelFacts, plan: MemoryPlan, record: MachineRecord, hit_rate: float, disk: float, num_tokens: int
) -> tuple[SpeedStep, ...]:
    in_memory = facts.num_moe_layers * facts.sizes.top_k * facts.memory_expert_bytes
    small = facts.dense_bytes + in_memory <= record.cache_bytes / 2
    costs = record.cached_layers if small else record.layers
    faster = record.cached_bytes_per_s / record.cpu_rate("bf16") if small else 1.0
    # With room for all experts, each is moved to a line's begin once.
    off_lines = facts.is_off_lines and plan.num_slots < plan.num_experts
    rate = faster * record.cpu_rate(facts.expert_kind, off_lines=off_lines)
    dense_kind = "packed" if facts.expert_kind == "packed" else "bf16"
    operations, weights = latent_work(facts.config, num_tokens)
    layer_s, token_s = layer_cost(facts.model_type, costs)
    steps = [
        _read("resident weights", facts.dense_bytes, faster * record.cpu_rate(dense_kind)),
        _read(f"experts ({facts.expert_kind})", in_memory, rate),
        _read("KV cache, half full", plan.kv_bytes / 2, record.read_bytes_per_s),
        _times("layers, whatever they read", facts.num_layers, layer_s),
        _times("a token, beside its layers", 1, token_s),
    ]  # fmt: skip
    if operations:
        steps += [
            _compute("attention to latents", operations, record.latent_flops_per_s),
            _read("between heads and latents", weights * facts.item_bytes, record.latent_bytes_per_s),
        ]
    if plan.num_slots < plan.num_experts:
        steps += _missing(facts, costs, hit_rate, disk, rate)
    return tuple(steps)


def _missing(
    facts: ModelFacts, costs: LayerCosts, hit_rate: float, disk: float, rate: float
) -> Iterator[SpeedStep]:  # fmt: skip
    """Time of fetches. A layer's missing experts are read together, while those that are there are computed."""
    num_layers, per_layer = facts.num_moe_layers, facts.sizes.top_k
    yield _times("layers, while experts are missing", num_layers, costs.watched_s)
    read = _read("missed experts, from disk", (1 - hit_rate) * facts.routed_bytes, disk)
    calls = num_layers * (1 - hit_rate**per_layer)
    yield read
    yield _times("layers that fetch", calls, costs.fetch_s)
    hidden_s = 0.0
    for missed in range(1, per_layer):
        chance = math.comb(per_layer, missed) * (1 - hit_rate) ** missed * hit_rate ** (per_layer - missed)
        waiting_s = costs.fetch_s + missed * facts.expert_bytes / disk
        hidden_s += num_layers * chance * min(waiting_s, (per_layer - missed) * facts.memory_expert_bytes / rate)
    yield SpeedStep(what="of that, while others are computed", amount=calls, rate=-calls / max(hidden_s, 1e-9),
               seconds=-hidden_s, unit="times")  # fmt: skip


def _decode_on_device(
    facts: ModelFacts, plan: MemoryPlan, record: MachineRecord, hit_rate: float, ram_rate: float, disk: float
) -> tuple[SpeedStep, ...]:
    assert plan.device is not None and record.device_bytes_per_s and record.link_pinned_bytes_per_s, f"{record=}"
    speed = record.device_bytes_per_s
    missed = (1 - hit_rate) * facts.routed_bytes
    steps = [
        _read("resident weights", facts.dense_bytes, speed),
        _read("experts in device slots", hit_rate * facts.routed_bytes, speed),
        _read("KV cache, half full", plan.device.kv_bytes / 2, speed),
        _times("layers, whatever they read", facts.num_layers, record.device_layer_s or record.layers.modules_s),
    ]
    if missed:
        link, cpu = record.link_pinned_bytes_per_s, record.cpu_rate(facts.expert_kind)
        both = (record.link_beside_cpu_bytes_per_s or 0) + (record.cpu_beside_link_bytes_per_s or 0)
        best = max(link, cpu, both)
        how = {link: "over the link", cpu: "on the CPU", both: "over the link and on the CPU"}[best]
        steps.append(_read(f"missed experts, {how}", missed, best))
        from_disk = (1 - ram_rate) * facts.routed_bytes
        if from_disk:
            steps.append(_read("of these, from disk to RAM", from_disk, disk))
    return tuple(steps)


def _prompt(
    facts: ModelFacts, plan: MemoryPlan, record: MachineRecord, disk: float, num_tokens: int
) -> tuple[SpeedStep, ...]:
    """Every chunk reads the experts that it touches once: all of the first chunk's from disk, the cache is empty."""
    chunk = min(num_tokens, plan.prefill_chunk)
    per_layer = facts.sizes.num_experts / facts.num_moe_layers
    touched = per_layer * (1 - (1 - facts.sizes.top_k / per_layer) ** chunk) * facts.num_moe_layers
    num_chunks = -(-num_tokens // chunk)
    kept = min(1.0, plan.num_slots / facts.sizes.num_experts)
    from_disk = touched * facts.expert_bytes * (1 + (num_chunks - 1) * (1 - kept))
    weights = facts.dense_bytes / facts.item_bytes + facts.num_expert_weights * facts.sizes.top_k * facts.num_moe_layers
    flops = _FLOPS_A_WEIGHT * weights * num_tokens
    steps = [_read("experts, from disk", from_disk, disk)]
    if plan.device is None:
        return (*steps, _compute("products", flops, record.cpu_flops_per_s))
    link = record.link_pinned_bytes_per_s or disk
    return (*steps, _read("experts, over the link", num_chunks * touched * facts.expert_bytes, link))


def _read(what: str, num_bytes: float, rate: float) -> SpeedStep:
    return SpeedStep(what=what, amount=num_bytes, rate=rate, seconds=num_bytes / rate)


def _times(what: str, amount: float, each_s: float) -> SpeedStep:
    return SpeedStep(what=what, amount=amount, rate=1 / max(each_s, 1e-9), seconds=amount * each_s, unit="times")


def _compute(what: str, operations: float, rate: float) -> SpeedStep:
    return SpeedStep(what=what, amount=operations, rate=rate, seconds=operations / rate, unit="operations")
