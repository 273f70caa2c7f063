"""Fixed cost of a token, measured on the bundled model: its weights are nearly nothing.

A layer and what is beside the layers are told apart by running the model with one layer as well, and, where layers are
called one by one, by hooks on them: as they are (by the kernels, where they can) and module by module. Each is measured
with caches that hold the model, and after other memory was read, as in a model that no cache holds: before a token
where one call computes all layers, before each layer otherwise.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from offmoe.checkpoint.locate import demo_model_folder
from offmoe.core.config import make_config
from offmoe.engine.engine import Engine
from offmoe.engine.parts import parts_of
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.machine.record import LayerCosts
from offmoe.probe.speeds import cached_speed

PROMPT = list(range(1, 17))
# Tokens a round; the first ones, in which modules check themselves, do not count.
NUM_TOKENS, NUM_WARM = 72, 24
# Read before a layer, so that caches hold nothing of it.
COLD_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """Seconds; `libraries_bytes` is what loading took beside the model."""

    layers: LayerCosts
    cached_layers: LayerCosts
    libraries_bytes: int
    cached_bytes_per_s: float


@dataclass
class _Watch:
    """Hooks of the decoder layers: when each began and ended."""

    cold: torch.Tensor | None
    layer_s: list[float] = field(default_factory=list)
    touching_s: float = 0.0
    _begin_s: float = 0.0

    def before(self, *_: object) -> None:
        begin = time.perf_counter()
        if self.cold is not None:
            self.cold.numpy().sum()  # on this thread alone
        self._begin_s = time.perf_counter()
        self.touching_s += self._begin_s - begin

    def after(self, *_: object) -> None:
        self.layer_s.append(time.perf_counter() - self._begin_s)


def measure_costs(baseline_bytes: int, kernels: CpuKernels | None) -> ModelCosts:
    """Some seconds. First of all: what libraries take is seen in the process's growth."""
    with _demo(baseline_bytes) as engine:
        _decode(engine)  # experts come from disk, modules check themselves
        memories = {"layers": torch.ones(COLD_BYTES // 4), "cached_layers": None}
        rate = cached_speed(kernels)
        resident = {name: _resident_costs(engine, cold, rate) for name, cold in memories.items()}
        step_s = {name: _decode(engine, cold)[0] for name, cold in memories.items()}
        num_experts, libraries_bytes = engine.plan.num_experts, engine.plan.runtime_bytes
        num_layers, per_layer = len(parts_of(engine).experts.layers), engine.top_k
    watched, fetching = (_with_slots(num_slots, memories) for num_slots in (num_experts - 1, num_experts // 2))
    found = {}
    for name, costs in resident.items():
        watched_s, (fetching_s, hit_rate) = max(step_s[name], watched[name][0]), fetching[name]
        calls = num_layers * (1 - hit_rate**per_layer)
        found[name] = LayerCosts(
            **costs, watched_s=(watched_s - step_s[name]) / num_layers,
            fetch_s=max(0.0, fetching_s - watched_s) / max(1e-9, calls),
        )  # fmt: skip
    return ModelCosts(**found, libraries_bytes=libraries_bytes, cached_bytes_per_s=rate)


def _resident_costs(engine: Engine, cold: torch.Tensor | None, rate: float) -> dict[str, float]:
    """With all experts in memory, and `cold` read in between; weights come at `rate` bytes a second, which is taken
    off.
    """
    layer_bytes, rest_bytes = _bytes_of(engine)
    by_depth = None
    if cold is None or engine.stats().decode_path == "fused":  # without hooks, which cost something themselves
        by_depth = _times_by_depth(engine, cold)
    whole_s, whole_token_s = by_depth or _layer_times(engine, cold)
    with parts_of(engine).only_eager("layers are measured one by one"):
        modules_s, token_s = _layer_times(engine, cold)
    return {
        "whole_s": max(0.0, whole_s - layer_bytes / rate), "modules_s": max(0.0, modules_s - layer_bytes / rate),
        "whole_token_s": max(0.0, whole_token_s - rest_bytes / rate), "token_s": max(0.0, token_s - rest_bytes / rate),
    }  # fmt: skip


def _times_by_depth(engine: Engine, cold: torch.Tensor | None) -> tuple[float, float] | None:
    """Seconds of one layer, and of a token beside its layers. None where no file can be made for a model of one layer
    beside the bundled one.
    """
    num_layers = len(_decoder_layers(engine.model))
    try:
        with tempfile.TemporaryDirectory() as name:
            _make_shallow(Path(name))
            with _demo(0, folder=Path(name)) as shallow:
                _decode(shallow)
                all_s, one_s = _decode(engine, cold)[0], _decode(shallow, cold)[0]
    except (OSError, NotImplementedError):
        return None
    layer_s = max(0.0, all_s - one_s) / (num_layers - 1)
    return layer_s, max(0.0, one_s - layer_s)


def _make_shallow(folder: Path) -> None:
    """The bundled model with its first layer alone: another config beside links to its files. Raises OSError."""
    for file in demo_model_folder().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((demo_model_folder() / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}), encoding="utf-8")


@contextmanager
def _demo(baseline_bytes: int, *, folder: Path | None = None, **options: Any) -> Iterator[Engine]:
    config = make_config(**{"device": "cpu", "prefetch": "off", "compile": "off", "warm_start": False, **options})
    with Engine(
        folder or demo_model_folder(), config, baseline_bytes=baseline_bytes, progress=lambda stage, done, total: None
    ) as engine:
        yield engine


def _with_slots(num_slots: int, memories: dict[str, torch.Tensor | None]) -> dict[str, tuple[float, float]]:
    """A token's seconds and hit rate for each of `memories`. Without what is tried out in the first few hundred tokens,
    and costs a token then, not a layer: prefetching, and other policies than the plain one.
    """
    with _demo(0, expert_slots=num_slots, policy="lru") as engine:
        _decode(engine)
        return {name: _decode(engine, cold) for name, cold in memories.items()}


def _decode(engine: Engine, cold: torch.Tensor | None = None) -> tuple[float, float]:
    """Seconds of a token, and hits; `cold` is read before each, in time that does not count."""
    # Other ids each time than the model would write: it repeats itself, and real text does not.
    ids = iter(range(40, engine.vocab_size, 37))
    marks: list[tuple[float, float]] = []

    def choose(_: torch.Tensor, __: torch.Tensor) -> int:
        begin_s = time.perf_counter()
        if cold is not None:
            cold.numpy().sum()
        marks.append((begin_s, time.perf_counter()))
        return next(ids)

    stats = engine.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True, choose=choose).stats
    pairs = zip(marks[NUM_WARM:], marks[NUM_WARM + 1 :], strict=False)
    return median(end_s - begin_s for (_, begin_s), (end_s, _) in pairs), stats.decode.hit_rate


def _layer_times(engine: Engine, cold: torch.Tensor | None) -> tuple[float, float]:
    """Seconds of one layer, and of a token beside its layers: medians."""
    watch, layers = _Watch(cold), _decoder_layers(engine.model)
    handles = [layer.register_forward_pre_hook(watch.before) for layer in layers]
    handles += [layer.register_forward_hook(watch.after) for layer in layers]
    marks: list[tuple[float, int, float]] = []

    def choose(_: torch.Tensor, logits: torch.Tensor) -> int:
        marks.append((time.perf_counter(), len(watch.layer_s), watch.touching_s))
        return int(logits.argmax())

    try:
        engine.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True, choose=choose)
    finally:
        for handle in handles:
            handle.remove()
    layer_s, token_s = [], []
    for (begin_s, first, touched_s), (end_s, last, touched_after_s) in zip(
        marks[NUM_WARM:], marks[NUM_WARM + 1 :], strict=False
    ):
        inside = math.fsum(watch.layer_s[first:last])
        layer_s.append(inside / len(layers))
        token_s.append(end_s - begin_s - inside - (touched_after_s - touched_s))
    return median(layer_s), max(0.0, median(token_s))


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The longest of the model's lists of modules."""
    return max((list(module) for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def _bytes_of(engine: Engine) -> tuple[float, float]:
    """Bytes that a token reads of one layer, its experts counted, and beside the layers."""
    experts, layers = parts_of(engine).experts, _decoder_layers(engine.model)
    routed = len(experts.layers) * experts.top_k * experts.layers[0].expert_bytes
    inside = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    head = engine.model.get_output_embeddings()
    return (inside + routed) / len(layers), sum(parameter.nbytes for parameter in head.parameters())
