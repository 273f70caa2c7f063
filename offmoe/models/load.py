"""From a folder to a model that runs: meta build, expert index, resident weights, memory plan, cache, seam."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from offmoe.base.budget import SLACK_BYTES, MemoryPlan, auto_ram, plan_memory
from offmoe.base.config import EngineConfig
from offmoe.base.counters import Counters
from offmoe.base.errors import BudgetError, CheckpointError, UnsupportedModelError
from offmoe.base.machine import available_ram_bytes, rss_bytes
from offmoe.cache.expert_cache import ExpertCache
from offmoe.cache.policy import make_policy
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.checkpoint.index import CheckpointIndex, read_json
from offmoe.executor.executor import Executor
from offmoe.executor.uncached import UncachedExecutor
from offmoe.formats.dense import TORCH_DTYPES
from offmoe.models.expert_map import map_experts, streamed_parameters
from offmoe.models.probe import probe_model
from offmoe.models.resident import load_resident, resident_bytes
from offmoe.models.seam import ExpertsExecutor, LayerBinding, attach, bind
from offmoe.models.transformers_internals import SEAM_NAME, KeyMapping, experts_modules, served_families
from offmoe.models.workspace import choose_chunk, workspace_bytes
from offmoe.tiers.disk import DiskTier
from offmoe.tiers.host import HostPool

Progress = Callable[[str, int, int], None]
DEFAULT_CONTEXT_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A running model and the parts that serve its experts."""

    model: PreTrainedModel
    index: CheckpointIndex
    experts: ExpertIndex
    cache: ExpertCache
    disk: DiskTier
    pool: HostPool
    executor: Executor
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
        _attach_all(self.model, None)
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
    index = CheckpointIndex.open(folder)
    disk: DiskTier | None = None
    try:
        model = build_on_meta(model_config, index, trust_remote_code=config.trust_remote_code)
        mapping = KeyMapping(model)
        targets = mapping.targets(index.tensors)
        experts, expert_keys = map_experts(model, index, mapping, targets)
        counters = Counters()
        disk = DiskTier(index.files, io=config.io, counters=counters)
        slot_bytes = experts.slot_bytes(direct=disk.direct)
        _take_experts_out(model)
        ram = config.ram if config.ram is not None else baseline_room(baseline_bytes)
        room = ram - (rss_bytes() - baseline_bytes) - resident_bytes(model) - SLACK_BYTES
        _refuse_hopeless(ram, room, experts, slot_bytes)
        context_length = _context_length(config, model)
        load_resident(
            model, index, mapping, targets, expert_keys, lambda done, total: progress("resident weights", done, total)
        )
        probe = probe_model(model, context_length)
        chunk = config.prefill_chunk or choose_chunk(
            model, context_length=context_length, room_bytes=room - probe.kv_bytes
        )
        chunk = min(chunk, context_length) if probe.chunkable else context_length
        resident = resident_bytes(model)
        plan = plan_memory(
            ram_bytes=ram, runtime_bytes=max(0, rss_bytes() - baseline_bytes - resident), resident_bytes=resident,
            kv_bytes=probe.kv_bytes,
            workspace_bytes=workspace_bytes(model, chunk=chunk, context_length=context_length),
            slot_bytes=slot_bytes, num_experts=experts.num_experts, top_k=experts.top_k, experts=config.experts,
            prefill_chunk=chunk,
        )  # fmt: skip
        pool = HostPool(num_slots=plan.num_slots, slot_bytes=slot_bytes)
        cache = ExpertCache(experts, pool, disk, make_policy(config.policy), counters)
        executor = Executor(cache)
        _attach_all(model, executor)
    except BaseException:
        if disk is not None:
            disk.close()
        index.close()
        raise
    return LoadedModel(
        model=model, index=index, experts=experts, cache=cache, disk=disk, pool=pool, executor=executor, plan=plan,
        context_length=context_length, chunkable=probe.chunkable,
    )  # fmt: skip


def baseline_room(baseline_bytes: int) -> int:
    """What `ram="auto"` allows the process to grow by: free memory, plus what the libraries have taken already."""
    return auto_ram(available_ram_bytes() + max(0, rss_bytes() - baseline_bytes))


def read_model_config(folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """config.json as transformers' class. Raises UnsupportedModelError naming the nearest supported type."""
    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{folder / 'config.json'} has no model_type; it is no Hugging Face model config")
    if "auto_map" in raw and model_type not in transformers.CONFIG_MAPPING and not trust_remote_code:
        raise UnsupportedModelError(
            f"{model_type!r} brings its own Python code, which offmoe does not run unasked; read it, then use "
            "--trust-remote-code"
        )
    quantised = raw.get("quantization_config")
    if isinstance(quantised, dict):
        raise UnsupportedModelError(
            f"{folder.name} is quantised ({quantised.get('quant_method', 'unknown method')}), which is not read yet; "
            "use the bfloat16 version"
        )
    if model_type not in transformers.CONFIG_MAPPING and "auto_map" not in raw:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know the architecture {model_type!r}"
            f"{_nearest(model_type)}; a newer transformers may"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is no valid {model_type} config: {_one_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - hub's strict dataclass errors share no base with the above
        if type(error).__module__.startswith("huggingface_hub"):
            raise CheckpointError(
                f"{folder / 'config.json'} is no valid {model_type} config: {_one_line(error)}"
            ) from None
        raise


def build_on_meta(config: PreTrainedConfig, index: CheckpointIndex, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model with parameters that have shapes but no memory; buffers are real.

    Raises UnsupportedModelError for a dense model, and for an MoE whose experts are not behind transformers' door.
    """
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or _stored_dtype(index)
    model_class = _model_class(config)
    with accelerate.init_empty_weights(include_buffers=False):
        if model_class is not None:
            model = model_class._from_config(config, dtype=dtype)
        else:
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            except ValueError as error:
                raise UnsupportedModelError(
                    f"{config.model_type!r} has no text generation model: {_one_line(error)}"
                ) from None
    if not experts_modules(model):
        if _looks_moe(index):
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps its experts where offmoe cannot serve them"
                f"{_nearest(config.model_type)}; see the models table in the README"
            )
        raise UnsupportedModelError(
            f"{type(model).__name__} is a dense model: it has no experts to stream; use transformers or llama.cpp"
        )
    model.eval()
    folder = index.folder
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder / 'generation_config.json'} is not valid: {_one_line(error)}") from None
    return model


def _model_class(config: PreTrainedConfig) -> Any:
    """The class that the checkpoint names, when transformers has it and it generates."""
    for name in getattr(config, "architectures", None) or ():
        found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        if _is_generator(found):
            return found
    return None


def _is_generator(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, PreTrainedModel) and bool(found.can_generate())


def _stored_dtype(index: CheckpointIndex) -> torch.dtype:
    found = (TORCH_DTYPES[entry.dtype] for entry in index.tensors.values() if entry.dtype in TORCH_DTYPES)
    return next(found, torch.float32)


def _attach_all(model: PreTrainedModel, executor: ExpertsExecutor | None) -> None:
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
        raise BudgetError(
            f"context_length is {config.context_length}, the model was made for {longest}; use --context-length {longest}"
        )
    return config.context_length


def _refuse_hopeless(ram: int, room: int, experts: ExpertIndex, slot_bytes: int) -> None:
    """Before gigabytes are read: does one layer's top-k fit beside the weights at all?"""
    need = experts.top_k * slot_bytes
    if room < need:
        smallest = -(-(ram - room + need) // (1 << 20))
        raise BudgetError(
            f"ram is {-(-ram // (1 << 20))} MiB, resident weights and one layer's {experts.top_k} experts need "
            f"{smallest} MiB without any KV cache; use --ram {smallest + 256}MiB or more"
        )


def _looks_moe(index: CheckpointIndex) -> bool:
    return any(re.search(r"\bexperts?\b|moe", name) for name in index.tensors)


def _nearest(model_type: str) -> str:
    close = difflib.get_close_matches(model_type, served_families(), n=1, cutoff=0.4)
    return f"; nearest that offmoe runs: {close[0]}" if close and close[0] != model_type else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
