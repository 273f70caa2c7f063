"""The plan of a model: gathers what is known of it and of the machine. For `offmoe plan`, and before loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offmoe.checkpoint.gguf.file import is_gguf
from offmoe.checkpoint.hub.headers import locate_headers
from offmoe.checkpoint.identity import model_hash
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.core.config import EngineConfig
from offmoe.core.errors import OffmoeError, UsageError
from offmoe.core.progress import Progress
from offmoe.core.units import MIB, format_bytes, format_percent
from offmoe.machine.instruction_sets import packs_here
from offmoe.machine.memory import available_ram_bytes, free_vram_bytes, total_ram_bytes, total_vram_bytes
from offmoe.machine.record import DriveSpeed, MachineRecord, read_record
from offmoe.memory.auto import AutoFacts
from offmoe.planner.hit_rates import HitCurve, published_curve, traced_curve
from offmoe.planner.machines import find_machine
from offmoe.planner.model_facts import QUANTISED_BYTES, ModelFacts, read_facts
from offmoe.planner.plan import Plan, make_plan
from offmoe.trace.reader import read_trace

# What libraries took where it was not measured (`offmoe probe` does): torch without CUDA on Linux.
LIBRARIES_BYTES = 440 * MIB


@dataclass(frozen=True, kw_only=True)
class PlanSubject:
    """A model and a machine, read once, of which many plans can be made."""

    facts: ModelFacts
    known: AutoFacts
    record: MachineRecord | None
    curve: HitCurve

    def plan(self, config: EngineConfig, *, prompt_tokens: int | None = None) -> Plan:
        """Return the plan under `config`. Raises UsageError for impossible settings."""
        return make_plan(
            self.facts, config, self.known, record=self.record, curve=self.curve, prompt_tokens=prompt_tokens,
            libraries_bytes=LIBRARIES_BYTES if self.record is None else self.record.libraries_bytes,
            drive=_drive(self.record, self.facts.path),
        )  # fmt: skip

    def with_experts_as(self, expert_format: str) -> PlanSubject:
        """The same with experts as `offmoe quantize` writes them."""
        return replace(self, facts=self.facts.with_experts_as(expert_format))

    def with_any_ram(self) -> PlanSubject:
        """The same where memory is as large as it is asked for."""
        return replace(self, known=replace(self.known, ram_bytes=None, total_ram_bytes=None))


def plan_subject(
    model: str | None, config: EngineConfig, *, machine: str | None = None, trace: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> PlanSubject:  # fmt: skip
    """Read headers of `model`, and what is known of this machine or of the one called `machine`.

    Raises OffmoeError subclasses.
    """
    other = None if machine is None else find_machine(machine)
    with locate_headers(model, progress, config.revision) as folder:
        direct = config.io != "buffered" and (other is not None or has_direct_reads(folder))
        facts = read_facts(folder, direct=direct)
        curve = None
        if trace is not None:
            curve = traced_curve(read_trace(trace, model_hash=model_hash(folder)), facts.expert_bytes)
    known = _known(config.device, other, direct=direct, longest=facts.longest_context)
    _refuse_absent_device(config, known, machine)
    curve = curve or published_curve(
        facts.model_type, num_experts=facts.sizes.num_experts, per_token=facts.num_moe_layers * facts.sizes.top_k
    )
    return PlanSubject(facts=facts, known=known, record=other or read_record(), curve=curve)


def run_plan(
    model: str | None, config: EngineConfig, *, machine: str | None = None, trace: Path | None = None,
    prompt_tokens: int | None = None, expert_format: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Plan:  # fmt: skip
    """The plan of `model` on this machine, or on the one called `machine`. `expert_format`: experts as
    `offmoe quantize` writes them. Raises OffmoeError subclasses.
    """
    subject = plan_subject(model, config, machine=machine, trace=trace, progress=progress)
    if expert_format is not None:
        subject = subject.with_experts_as(expert_format)
    return subject.plan(config, prompt_tokens=prompt_tokens)


@dataclass(frozen=True, kw_only=True)
class FormatRow:
    """A model with its experts in one format: bytes on disk, and its plan for each budget of RAM in bytes."""

    expert_format: str
    total_bytes: int
    plans: dict[int, Plan]


def plan_formats(subject: PlanSubject, config: EngineConfig, budgets: Sequence[int]) -> list[FormatRow]:
    """Plans for experts as published and as `offmoe quantize` writes them, with each budget of RAM."""
    rows, anywhere = [], subject.with_any_ram()
    published = subject.facts.expert_kind
    for expert_format in (published, *(name for name in QUANTISED_BYTES if name != published)):
        of_format = anywhere if expert_format == published else anywhere.with_experts_as(expert_format)
        plans = {budget: of_format.plan(replace(config, ram=budget)) for budget in budgets}
        rows.append(FormatRow(expert_format=expert_format, total_bytes=of_format.facts.total_bytes, plans=plans))
    return rows


def predict_plan(folder: Path, config: EngineConfig) -> Plan | None:
    """The plan before loading, on a machine that was probed; None elsewhere, and for what the loader will refuse."""
    if read_record() is None:
        return None
    try:
        return run_plan(str(folder), replace(config, revision=None))
    except OffmoeError:
        return None


def against_plan(totals: Mapping[str, Any]) -> str | None:
    """The prediction beside what `Engine.stats` has; None where nothing was predicted, or nothing decoded."""
    foreseen = totals.get("predicted")
    if foreseen is None or not totals["decoded_tokens"]:
        return None
    speeds = foreseen["decode_tok_per_s"], totals["decode_tok_per_s"]
    peaks = foreseen["peak_bytes"], totals["peak_rss_growth_bytes"]
    hits = foreseen["hit_rate"], totals["decode_hit_rate"]
    device = ""
    if totals.get("device_peak_bytes") is not None:
        planned, measured = totals["device_planned_bytes"], totals["device_peak_bytes"]
        device = f"; on the device {format_bytes(planned)}, its driver counted, measured {format_bytes(measured)}"
    return (
        f"plan: predicted {speeds[0]:.1f} tok/s, measured {speeds[1]:.1f}; hits {format_percent(hits[0])}, measured "
        f"{format_percent(hits[1])}; peak {format_bytes(peaks[0])}, measured {format_bytes(peaks[1])}{device}"
    )


def _known(device: str, other: MachineRecord | None, *, direct: bool, longest: int | None) -> AutoFacts:
    if other is not None:
        return AutoFacts(
            has_device=other.vram_bytes is not None, longest_context=longest, ram_bytes=other.ram_bytes,
            vram_bytes=other.vram_bytes, direct_reads=direct, total_ram_bytes=other.ram_bytes,
            total_vram_bytes=other.vram_bytes,
        )  # fmt: skip
    vram = None if device == "cpu" else free_vram_bytes()
    return AutoFacts(
        has_device=vram is not None, longest_context=longest, ram_bytes=available_ram_bytes(), vram_bytes=vram,
        direct_reads=direct, total_ram_bytes=total_ram_bytes(),
        total_vram_bytes=None if vram is None else total_vram_bytes(), packs=packs_here(),
    )  # fmt: skip


def _refuse_absent_device(config: EngineConfig, known: AutoFacts, machine: str | None) -> None:
    """Raise UsageError for a plan of a device that the machine does not have."""
    asked = "vram is set" if config.vram is not None else f"device is {config.device}"
    if known.has_device or (config.vram is None and not config.device.startswith("cuda")):
        return
    where = "nvidia-smi shows no GPU here" if machine is None else f"{machine!r} has no GPU"
    raise UsageError(f"{asked}, and {where}; leave it out, or plan for another machine with --for")


def _drive(record: MachineRecord | None, path: Path | None) -> DriveSpeed | None:
    return None if record is None else record.drive(path or Path())


def has_direct_reads(model: Path) -> bool:
    """True when the file system that `model` lies on has reads past the page cache."""
    path = model if is_gguf(model) else next(iter(sorted(model.glob("*.safetensors"))), None)
    if path is None:
        return False
    file = ShardFile(path)
    try:
        return file.open_direct()
    finally:
        file.close()
