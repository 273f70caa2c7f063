"""The systems that `scripts/bench device` times, behind one contract: feed these ids, tell the seconds of each.

All are teacher-forced (the ids are given), and all choose a next id greedily after every token, which they tell and
which is not fed back: so every system does the same work and waits for the device as a real generation does.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import offmoe
from benchlib.device_checkpoint import MadeModel
from offmoe.api import load_engine
from offmoe.core.config import make_config
from offmoe.loader.fetch import fetch_model
from offmoe.machine.memory import rss_bytes


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One run: seconds of the prompt and of every id after it, the ids chosen, and what the engine counted."""

    prefill_s: float
    decode_s: tuple[float, ...]
    next_ids: tuple[int, ...]
    prefill_counts: dict[str, int] = field(default_factory=dict)
    decode_counts: dict[str, int] = field(default_factory=dict)

    @property
    def token_s(self) -> float:
        """Median seconds of a decoded token."""
        return statistics.median(self.decode_s)


def release_device() -> None:
    """Give what torch keeps for later back to the device, so that the next engine finds it free and counts its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class System(Protocol):
    """Something that runs a model over ids."""

    name: str

    def run(self, ids: Sequence[int], *, num_prompt: int) -> Timed:
        """The first `num_prompt` ids at once, the others one at a time."""

    def close(self) -> None:
        """Give memory back."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where engines compute: a CUDA device, or one played at a set link speed for trying the script without a GPU."""

    simulated_bytes_per_s: float | None = None

    @property
    def torch_device(self) -> torch.device:
        """Of the model's weights."""
        return torch.device("cuda" if self.simulated_bytes_per_s is None else "cpu")

    def load(self, folder: Path | None, **options: Any) -> offmoe.Engine:
        """As `offmoe.load`, here. A simulated device is made anew for each engine, which closes it."""
        if self.simulated_bytes_per_s is None:
            return offmoe.load(folder, device="cuda", **options)
        from offmoe.tiers.device import SimulatedDevice

        config = make_config(**options)
        return load_engine(
            fetch_model(folder, config), config, baseline_bytes=rss_bytes(), tell=lambda line: None,
            device=SimulatedDevice(bytes_per_s=self.simulated_bytes_per_s),
        )  # fmt: skip


class OffmoeSystem:
    """An engine."""

    def __init__(self, name: str, model: MadeModel, place: Place, **options: Any) -> None:
        self.name = name
        begin = time.perf_counter()
        self.engine = place.load(model.folder, **options)
        self.load_s = time.perf_counter() - begin

    def run(self, ids: Sequence[int], *, num_prompt: int) -> Timed:
        """As the contract says."""
        given: Iterator[int] = iter([*ids[num_prompt:], ids[0]])  # the last one chosen is never fed
        chosen: list[int] = []

        def choose(_: torch.Tensor, last: torch.Tensor) -> int:
            chosen.append(int(last.argmax()))
            return next(given)

        reply = self.engine.generate(
            list(ids[:num_prompt]), max_new_tokens=len(ids) - num_prompt + 1, choose=choose, ignore_eos=True
        )
        stats = reply.stats
        return Timed(
            prefill_s=stats.prefill_s, decode_s=stats.step_s, next_ids=tuple(chosen),
            prefill_counts=stats.prefill.as_dict(), decode_counts=stats.decode.as_dict(),
        )  # fmt: skip

    def close(self) -> None:
        """End the engine."""
        self.engine.close()


class TransformersSystem:
    """transformers' own model: whole on the device, or with what `max_memory` leaves out offloaded by accelerate."""

    def __init__(self, name: str, model: Any, *, experts: str) -> None:
        self.name, self.model, self._experts = name, model, experts
        self._device = model.get_input_embeddings().weight.device
        if self._device.type == "meta":  # offloaded: its hook brings it to where it is computed
            self._device = torch.device("cuda")

    @torch.inference_mode()
    def run(self, ids: Sequence[int], *, num_prompt: int) -> Timed:
        """As the contract says."""
        self.model.set_experts_implementation(self._experts)
        cache = DynamicCache(config=self.model.config)
        prefill_s, chosen = self._step(ids[:num_prompt], cache)
        next_ids, decode_s = [chosen], []
        for token_id in ids[num_prompt:]:
            elapsed_s, chosen = self._step([token_id], cache)
            decode_s.append(elapsed_s)
            next_ids.append(chosen)
        return Timed(prefill_s=prefill_s, decode_s=tuple(decode_s), next_ids=tuple(next_ids))

    def _step(self, ids: Sequence[int], cache: DynamicCache) -> tuple[float, int]:
        begin = time.perf_counter()
        tokens = torch.tensor([list(ids)], device=self._device)
        logits = self.model(tokens, past_key_values=cache, logits_to_keep=1).logits
        chosen = int(logits[0, -1].argmax())
        return time.perf_counter() - begin, chosen

    def close(self) -> None:
        """Forget the model; memory comes back when nobody else has it."""
        self.model = None


class OffloadedSystem(TransformersSystem):
    """transformers' model with weights that accelerate brings to the device for every forward."""


def resident_transformers(model: MadeModel, place: Place) -> list[TransformersSystem]:
    """One model whole on the device, run by each of transformers' own ways to compute experts."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model.folder, dtype="auto", device_map={"": place.torch_device}, experts_implementation="grouped_mm"
    )
    return [
        TransformersSystem(f"transformers {experts}", loaded, experts=experts) for experts in ("grouped_mm", "eager")
    ]


def offloaded_transformers(model: MadeModel, place: Place, *, vram_bytes: int) -> OffloadedSystem:
    """accelerate's CPU offload with `vram_bytes` for weights. Without a GPU all weights are where they are computed."""
    options: dict[str, Any] = {"device_map": {"": "cpu"}}
    if place.torch_device.type == "cuda":
        host_bytes = 2 * (model.all_experts_bytes + model.resident_bytes)
        options = {"device_map": "auto", "max_memory": {0: vram_bytes, "cpu": host_bytes}}
    loaded = AutoModelForCausalLM.from_pretrained(
        model.folder, dtype="auto", experts_implementation="grouped_mm", **options
    )
    return OffloadedSystem("accelerate CPU offload", loaded, experts="grouped_mm")
