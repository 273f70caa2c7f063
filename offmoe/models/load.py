"""From a folder to a model that runs: meta build, expert index, resident weights, memory plan, cache, seam."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offmoe.base.budget import SLACK_BYTES, MemoryPlan, auto_ram, plan_memory
from offmoe.base.config import EngineConfig
from offmoe.base.counters import Counters
from offmoe.base.errors import BudgetError, UsageError
from offmoe.base.machine import available_ram_bytes, rss_bytes
from offmoe.cache.expert_cache import ExpertCache
from offmoe.cache.policy import make_policy
from offmoe.cache.sources import DiskSource
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.executor.executor import Executor
from offmoe.executor.recovering import RecoveringExecutor
from offmoe.executor.uncached import UncachedExecutor
from offmoe.models.build import build_on_meta, read_model_config
from offmoe.models.expert_map import map_experts, streamed_parameters
from offmoe.models.probe import ModelProbe, foresee_kv_bytes, probe_model
from offmoe.models.resident import load_resident, resident_bytes
from offmoe.models.seam import ClosedExecutor, ExpertsExecutor, LayerBinding, attach, bind
from offmoe.models.tokenizer import load_tokenizer
from offmoe.models.transformers_internals import SEAM_NAME, KeyMapping, experts_modules
from offmoe.models.workspace import choose_chunk, workspace_bytes
from offmoe.tiers.disk import DiskTier
from offmoe.tiers.host import HostPool

Progress = Callable[[str, int, int], None]
DEFAULT_CONTEXT_LENGTH = 4096
# What libraries grow by when a model runs for the first time in a process (measured: 18 MiB).
FIRST_RUN_BYTES = 24 << 20


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A running model and the parts that serve its experts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    index: CheckpointIndex
    experts: ExpertIndex
    cache: ExpertCache
    disk: DiskTier
    pool: HostPool
    executor: ExpertsExecutor
    plan: MemoryPlan
    context_length: int
    chunkable: bool

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """Serve experts without the cache for a while."""
        _attach_all(self.model, UncachedExecutor(self.experts, self.index.files))
        try:
            yield
        finally:
            _attach_all(self.model, self.executor)

    def close(self) -> None:
        """Take the experts away from the model, end threads, give back memory, close files."""
        _attach_all(self.model, ClosedExecutor())
        self.disk.close()
        self.cache.close()
        self.pool.close()
        self.index.close()


def load_model(
    folder: Path, config: EngineConfig, *, baseline_bytes: int, progress: Progress = lambda stage, done, total: None
) -> LoadedModel:
    """Load `folder` under `config`'s budget, which counts from `baseline_bytes` of resident memory.

    Raises OffmoeError subclasses; whatever was opened or started is closed again on any failure.
    """
    model_config = read_model_config(folder, trust_remote_code=config.trust_remote_code)
    with ExitStack() as opened:
        index = CheckpointIndex.open(folder)
        opened.callback(index.close)
        model = build_on_meta(model_config, index, trust_remote_code=config.trust_remote_code)
        context_length = _context_length(config, model)
        mapping = KeyMapping(model)
        targets = mapping.targets(index.tensors)
        experts, expert_keys = map_experts(model, index, mapping, targets)
        counters = Counters()
        disk = DiskTier(index.files, io=config.io, counters=counters)
        opened.callback(disk.close)
        _take_experts_out(model)
        tokenizer = load_tokenizer(folder, trust_remote_code=config.trust_remote_code)
        budget = _Budget(model, experts, config, context_length, experts.slot_bytes(direct=disk.direct), baseline_bytes)
        budget.refuse_hopeless()
        load_resident(
            model, index, mapping, targets, expert_keys, lambda done, total: progress("resident weights", done, total)
        )
        probe = probe_model(model, context_length)
        plan = budget.plan(probe)
        pool = HostPool(num_slots=plan.num_slots, slot_bytes=plan.slot_bytes)
        cache = ExpertCache(
            plan.num_slots, len(experts.layers), DiskSource(experts, pool, disk), make_policy(config.policy), counters
        )
        executor = RecoveringExecutor(Executor(cache))
        _attach_all(model, executor)
        opened.pop_all()
    return LoadedModel(
        model=model, tokenizer=tokenizer, index=index, experts=experts, cache=cache, disk=disk, pool=pool,
        executor=executor, plan=plan, context_length=context_length, chunkable=probe.chunkable,
    )  # fmt: skip


class _Budget:
    """Divides what the user allows: once before weights are read, to refuse in time, and once when they are there."""

    def __init__(
        self, model: PreTrainedModel, experts: ExpertIndex, config: EngineConfig, context_length: int, slot_bytes: int,
        baseline_bytes: int,
    ) -> None:  # fmt: skip
        self._model, self._experts, self._config = model, experts, config
        self._context_length, self._slot_bytes = context_length, slot_bytes
        self._baseline_bytes = baseline_bytes
        self._ram = config.ram if config.ram is not None else baseline_room(baseline_bytes)
        self._resident_bytes = resident_bytes(model)
        self._runtime_bytes = max(0, rss_bytes() - baseline_bytes)

    def refuse_hopeless(self) -> None:
        """Raise BudgetError before gigabytes are read when the model cannot fit at its most modest."""
        chunk = min(self._context_length, self._config.prefill_chunk or self._choose_chunk(0))
        kv_bytes = foresee_kv_bytes(self._model, self._context_length)
        try:
            self._divide(kv_bytes, chunk)
        except BudgetError:
            self._runtime_bytes += FIRST_RUN_BYTES  # so that the budget in the message is one that works
            self._divide(kv_bytes, chunk)

    def plan(self, probe: ModelProbe) -> MemoryPlan:
        """The plan, now that the weights are loaded and the model has run once. Raises BudgetError."""
        chunk = self._context_length
        if probe.chunkable:
            slots = min(self._config.experts or self._experts.top_k, self._experts.num_experts)
            taken = self._runtime_bytes + self._resident_bytes + SLACK_BYTES + probe.kv_bytes + slots * self._slot_bytes
            chunk = min(chunk, self._config.prefill_chunk or self._choose_chunk(self._ram - taken))
        self._runtime_bytes = max(0, rss_bytes() - self._baseline_bytes - self._resident_bytes)
        return self._divide(probe.kv_bytes, chunk)

    def _choose_chunk(self, room_bytes: int) -> int:
        return choose_chunk(self._model, context_length=self._context_length, room_bytes=room_bytes)

    def _divide(self, kv_bytes: int, chunk: int) -> MemoryPlan:
        return plan_memory(
            ram_bytes=self._ram, runtime_bytes=self._runtime_bytes, resident_bytes=self._resident_bytes,
            kv_bytes=kv_bytes,
            workspace_bytes=workspace_bytes(self._model, chunk=chunk, context_length=self._context_length),
            slot_bytes=self._slot_bytes, num_experts=self._experts.num_experts, top_k=self._experts.top_k,
            experts=self._config.experts, prefill_chunk=chunk,
        )  # fmt: skip


def baseline_room(baseline_bytes: int) -> int:
    """What `ram="auto"` allows the process to grow by: free memory, plus what the libraries have taken already."""
    return auto_ram(available_ram_bytes() + max(0, rss_bytes() - baseline_bytes))


def _attach_all(model: PreTrainedModel, executor: ExpertsExecutor) -> None:
    for _, module in experts_modules(model):
        attach(module, executor)


def _take_experts_out(model: PreTrainedModel) -> None:
    """Remove the streamed parameters and bind each experts module to its number."""
    for layer_idx, (_, module) in enumerate(experts_modules(model)):
        params = streamed_parameters(module)
        first = next(iter(params.values()))
        for name in params:
            del module._parameters[name]
        bind(module, LayerBinding(layer_idx, first.shape[0], first.dtype))
    model.set_experts_implementation(SEAM_NAME)


def _context_length(config: EngineConfig, model: PreTrainedModel) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = longest if isinstance(longest, int) and longest > 0 else None
    if config.context_length is None:
        return min(DEFAULT_CONTEXT_LENGTH, longest or DEFAULT_CONTEXT_LENGTH)
    if longest is not None and config.context_length > longest:
        raise UsageError(
            f"context_length is {config.context_length}, the model was made for {longest}; "
            f"use --context-length {longest}"
        )
    return config.context_length
