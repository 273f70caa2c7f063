"""`offmoe plan`: what goes where and how fast it will be, before anything is loaded. Imports no engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from offmoe.core.config import EngineConfig, PackMode
from offmoe.core.errors import BudgetError, UsageError
from offmoe.core.units import format_seconds
from offmoe.machine.record import DriveSpeed, MachineRecord
from offmoe.memory.auto import AutoFacts, Complete, complete_config
from offmoe.memory.budget import CUDA_CONTEXT_BYTES, MemoryPlan
from offmoe.memory.kv_bytes import KvEstimate, estimate_kv
from offmoe.memory.planner import Machine, MemoryPlanner
from offmoe.planner.hit_rates import HitCurve
from offmoe.planner.model_facts import ModelFacts
from offmoe.planner.predict import SpeedPrediction, predict

DEFAULT_PROMPT_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`memory` and `prediction` are None where the model does not fit: `refusal` then says what it needs.

    `prediction` is None as well where the machine was not measured.
    """

    facts: ModelFacts
    complete: Complete
    kv: KvEstimate
    memory: MemoryPlan | None
    refusal: str | None
    prediction: SpeedPrediction | None
    record: MachineRecord | None

    def line(self) -> str:
        """One line for people."""
        if self.memory is None:
            return f"does not fit: {self.refusal}"
        speed = self.prediction
        if speed is None:
            return f"{self.memory.line()}; speed: not predicted, run `offmoe probe` once"
        return (
            f"{self.memory.line()}; predicted {speed.decode_tok_per_s:.1f} tok/s, first token of a prompt of "
            f"{speed.prompt_tokens} after {format_seconds(speed.ttft_s)}"
        )

    def predicted(self) -> dict[str, float] | None:
        """Prediction that a run can be held to, as `Engine.predicted`; None where no speed is predicted."""
        if self.memory is None or self.prediction is None:
            return None
        return {
            "peak_bytes": self.memory.expected_bytes, "hit_rate": round(self.prediction.hit_rate, 4),
            "decode_tok_per_s": round(self.prediction.decode_tok_per_s, 2),
        }  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Bytes, seconds."""
        facts, memory = self.facts, self.memory
        where = None
        if memory is not None:
            where = {**asdict(memory), "total_bytes": memory.total_bytes, "expected_bytes": memory.expected_bytes}
            if memory.device is not None:
                where["device"]["total_bytes"] = memory.device.total_bytes
        return {
            "model": facts.name, "fits": memory is not None, "refusal": self.refusal,
            "sizes": {
                "total_bytes": facts.total_bytes, "experts_bytes": facts.experts_total_bytes,
                "resident_disk_bytes": facts.resident_disk_bytes, "unused_bytes": facts.unused_bytes,
                "resident_bytes": facts.sizes.resident_bytes, "expert_bytes": facts.expert_bytes,
                "routed_bytes_per_token": facts.routed_bytes,
            },
            "kv": asdict(self.kv), "config": self.complete.config.as_dict(), "reasons": self.complete.reasons,
            "memory": where, "prediction": None if self.prediction is None else asdict(self.prediction),
            "machine": None if self.record is None else self.record.as_dict(),
        }  # fmt: skip


def make_plan(
    facts: ModelFacts, config: EngineConfig, known: AutoFacts, *, record: MachineRecord | None, libraries_bytes: int,
    curve: HitCurve, drive: DriveSpeed | None, prompt_tokens: int | None,
) -> Plan:  # fmt: skip
    """The plan for `facts` on a machine of which `known` is known; pure. Raises UsageError for impossible settings."""
    complete = complete_config(config, known)
    context = complete.config.context_length
    assert context is not None, "complete_config settles the context"
    prompt = min(DEFAULT_PROMPT_TOKENS, context) if prompt_tokens is None else prompt_tokens
    if prompt > context:
        raise UsageError(f"a prompt of {prompt} tokens is longer than the context of {context}; use --context {prompt}")
    on_device = complete.config.device != "cpu"
    facts, complete = _packed(facts, complete, known, on_device=on_device)
    kv = estimate_kv(facts.config, item_bytes=facts.item_bytes, context_length=context)
    sizes = replace(facts.sizes, resident_bytes=facts.device_resident_bytes) if on_device else facts.sizes
    division = MemoryPlanner(
        sizes=sizes,
        machine=Machine(
            ram_bytes=complete.config.ram or 0, runtime_bytes=libraries_bytes + facts.tokenizer_bytes,
            vram_free_bytes=_beside_driver(known.vram_bytes, config.vram) if on_device else None, is_cuda=on_device,
        ),
        config=config, context_length=context, kv_bytes=kv.num_bytes,
    )  # fmt: skip
    try:
        memory, refusal = division.plan(), None
    except BudgetError as error:
        memory, refusal = None, str(error)
    prediction = None
    if memory is not None and record is not None and drive is not None and (not on_device or record.device_bytes_per_s):
        prediction = predict(
            facts, memory, record, curve, drive=drive, direct=complete.config.io != "buffered", prompt_tokens=prompt,
            context_length=context,
        )  # fmt: skip
    return Plan(
        facts=facts, complete=complete, kv=kv, memory=memory, refusal=refusal, prediction=prediction, record=record
    )


def _packed(facts: ModelFacts, complete: Complete, known: AutoFacts, *, on_device: bool) -> tuple[ModelFacts, Complete]:
    """Facts of the model as RAM has it, and the setting that was decided."""
    packed, asked = facts.packed, complete.config.pack
    if packed is None or on_device:
        reason = "a device computes them" if on_device else "its experts are not plain bfloat16, outputs by inputs"
        return facts, _decided(complete, "off", reason)
    if asked == "off" or (asked == "auto" and not (known.packs and packed.is_worth_it)):
        return facts, _decided(complete, "off", "slower with this processor, or for experts so small")
    return facts.as_packed(), _decided(complete, "on", "bfloat16 weights in 12 bits, bit for bit the same")


def _decided(complete: Complete, pack: PackMode, reason: str) -> Complete:
    reasons = complete.reasons | {"pack": reason if complete.config.pack == "auto" else "as set"}
    return Complete(config=replace(complete.config, pack=pack), reasons=reasons)


def _beside_driver(free_bytes: int | None, allowed_bytes: int | None) -> int:
    """Bytes of the device beside its driver's part; as many as are allowed where that is not known."""
    most = free_bytes if free_bytes is not None else allowed_bytes or 0
    return max(0, most - CUDA_CONTEXT_BYTES)
