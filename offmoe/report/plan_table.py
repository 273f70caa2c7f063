"""The output of `offmoe plan`: sizes, where they go, the settings with their reasons, and the predicted speed."""

from __future__ import annotations

from offmoe.core.units import (
    format_bandwidth,
    format_bytes,
    format_percent,
    format_seconds,
    format_traffic,
)
from offmoe.machine.record import BUSY_SHARE, MachineRecord
from offmoe.memory.budget import EXPECTED_GROWTH_BYTES, DevicePlan, MemoryPlan
from offmoe.planner.make_plan import FormatRow
from offmoe.planner.plan import Plan
from offmoe.planner.predict import SpeedPrediction, SpeedStep

TableRows = list[tuple[str, str]]


def plan_tables(plan: Plan) -> list[tuple[str, TableRows]]:
    """(title, rows) of every table."""
    tables = [(plan.facts.name, _size_rows(plan))]
    if plan.memory is not None:
        tables += _memory_tables(plan.memory, plan.kv.how)
    tables.append(("settings", _setting_rows(plan)))
    if plan.prediction is not None and plan.record is not None:
        tables.append((f"speed, from {_whose(plan.record)}", _speed_rows(plan.prediction)))
    return tables


def format_lines(rows: list[FormatRow]) -> list[str]:
    """A table of formats against budgets of RAM: predicted tokens a second, "fits" without a prediction, "-"."""
    budgets = list(rows[0].plans)
    heads = ["experts as", "on disk", *(format_bytes(budget).replace(".00", "") for budget in budgets)]
    cells = [
        [row.expert_format, format_bytes(row.total_bytes), *(_in_short(row.plans[budget]) for budget in budgets)]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (heads, *cells)) for column in range(len(heads))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (heads, *cells)]


def _in_short(plan: Plan) -> str:
    if plan.memory is None:
        return "-"
    return "fits" if plan.prediction is None else f"{plan.prediction.decode_tok_per_s:.1f}"


def _size_rows(plan: Plan) -> TableRows:
    facts = plan.facts
    rows = [
        ("on disk", f"{format_bytes(facts.total_bytes)} ({facts.total_bytes} bytes)"),
        ("experts", f"{facts.sizes.num_experts} of {format_bytes(facts.expert_bytes)} ({facts.expert_kind}), "
                    f"{format_bytes(facts.experts_total_bytes)}; {format_bytes(facts.routed_bytes)} a token"),
        ("resident", f"{format_bytes(facts.sizes.resident_bytes)} in memory, "
                     f"{format_bytes(facts.resident_disk_bytes)} on disk"),
    ]  # fmt: skip
    if facts.unused_bytes:
        rows.append(("not loaded", f"{format_bytes(facts.unused_bytes)} of layers that guess tokens ahead, or twice"))
    return rows


def _memory_tables(memory: MemoryPlan, kv_how: str) -> list[tuple[str, TableRows]]:
    tables = []
    if memory.device is not None:
        tables.append((f"device, {format_bytes(memory.device.vram_bytes)}", _device_rows(memory.device, kv_how)))
    beside = "" if memory.device is None else " in RAM"
    rows = [("libraries", format_bytes(memory.runtime_bytes))]
    if memory.device is None:
        rows += [
            ("resident weights", format_bytes(memory.resident_bytes)),
            ("KV cache", f"{format_bytes(memory.kv_bytes)} ({kv_how})"),
        ]
    if memory.staging_bytes:
        rows.append(("staging", format_bytes(memory.staging_bytes)))
    rows += [
        (f"workspace{beside} of {memory.prefill_chunk} tokens", format_bytes(memory.workspace_bytes)),
        ("expert slots", _slots(memory.num_slots, memory.num_experts, memory.slot_bytes)),
        ("on disk only", f"{memory.num_experts - memory.num_slots} experts"),
        ("peak, predicted", f"{format_bytes(memory.expected_bytes)} (growth of {format_bytes(EXPECTED_GROWTH_BYTES)} "
                            f"counted), never above {format_bytes(memory.total_bytes)}"),
    ]  # fmt: skip
    if memory.load_bytes:
        rows.append(("while loading", f"{format_bytes(memory.load_bytes)} of weights on their way to the device"))
    return [*tables, (f"RAM, {format_bytes(memory.ram_bytes)}", rows)]


def _device_rows(device: DevicePlan, kv_how: str) -> TableRows:
    return [
        ("driver", format_bytes(device.context_bytes)),
        ("resident weights", format_bytes(device.resident_bytes)),
        ("KV cache", f"{format_bytes(device.kv_bytes)} ({kv_how})"),
        ("workspace", format_bytes(device.workspace_bytes)),
        ("kept free", format_bytes(device.slack_bytes)),
        ("expert slots", _slots(device.num_slots, device.num_experts, device.slot_bytes)),
        ("peak, predicted", format_bytes(device.total_bytes)),
    ]


def _slots(num_slots: int, num_experts: int, slot_bytes: int) -> str:
    size = f"{format_bytes(num_slots * slot_bytes)} in {num_slots} of {format_bytes(slot_bytes)}"
    return f"{size}: {format_percent(num_slots / num_experts)} of the experts"


def _setting_rows(plan: Plan) -> TableRows:
    config, reasons = plan.complete.config.as_dict(), plan.complete.reasons
    rows = [(name, f"{_shown(name, config[name])}: {reason}") for name, reason in reasons.items()]
    if plan.memory is not None:
        rows.append(("prefill_chunk", f"{plan.memory.prefill_chunk}: as large as its workspace may be"))
    return rows


def _shown(name: str, value: object) -> str:
    return format_bytes(value) if name in ("ram", "vram") and isinstance(value, int) else str(value)


def _speed_rows(speed: SpeedPrediction) -> TableRows:
    rows = [("hits", f"{format_percent(speed.hit_rate)} ({speed.hit_source})")]
    if speed.ram_hit_rate > speed.hit_rate:
        rows.append(("hits, RAM counted", format_percent(speed.ram_hit_rate)))
    rows += [(step.what, _arithmetic(step)) for step in speed.decode_steps]
    total = sum(step.seconds for step in speed.decode_steps)
    rows.append(("a token", f"{_seconds(total)} = {speed.decode_tok_per_s:.1f} tok/s"))
    rows += [(f"prompt: {step.what}", _arithmetic(step)) for step in speed.prompt_steps]
    rows.append((f"first token after {speed.prompt_tokens}", format_seconds(speed.ttft_s)))
    return rows


def _arithmetic(step: SpeedStep) -> str:
    seconds = _seconds(step.seconds)
    if step.unit == "bytes":
        return f"{format_traffic(step.amount)} / {format_bandwidth(step.rate)} = {seconds}"
    if step.unit == "times":
        return f"{step.amount:.0f} x {1e3 / step.rate:.3f} ms = {seconds}"
    return f"{step.amount / 1e9:.1f} G / {step.rate / 1e9:.0f} G {step.unit}/s = {seconds}"


def _seconds(seconds: float) -> str:
    """With a digit more than elsewhere below a second: parts of a token are fractions of a millisecond."""
    return f"{seconds * 1e3:.1f} ms" if abs(seconds) < 1 else format_seconds(seconds)


def _whose(record: MachineRecord) -> str:
    busy = f", while other programs used {format_percent(record.busy_share)} of the processors"
    return f"{record.name} ({record.source}{busy if record.busy_share > BUSY_SHARE else ''})"
