"""From a folder's headers to a model without weights: its files, what each tensor in them is, where experts lie."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.quant_config import Quantisation
from offmoe.core.config import EngineConfig
from offmoe.core.counters import Counters
from offmoe.hf.adapters.base import AdaptedExperts
from offmoe.hf.context import longest_context
from offmoe.hf.expert_map import map_experts, streamed_parameters
from offmoe.hf.internals import SEAM_NAME, KeyMapping, Target, experts_modules
from offmoe.hf.seam import LayerBinding, bind
from offmoe.hf.unexpected import LeftOut, sort_out
from offmoe.loader.build import build_on_meta, read_model_config
from offmoe.machine.memory import total_ram_bytes
from offmoe.memory.auto import AutoFacts, complete_config
from offmoe.tiers.disk import DiskTier

if TYPE_CHECKING:
    from offmoe.tiers.device import Device


@dataclass(frozen=True, kw_only=True)
class HeadersRead:
    """A model without weights, its files, and what each tensor in them is. `config` is settled but for memory."""

    config: EngineConfig
    context_length: int
    quantisation: Quantisation | None
    index: CheckpointIndex
    model: PreTrainedModel
    mapping: KeyMapping
    targets: dict[str, Target]
    left_out: LeftOut
    experts: ExpertIndex
    expert_keys: set[str]
    disk: DiskTier
    counters: Counters


def read_headers(folder: Path, config: EngineConfig, opened: ExitStack, device: Device | None) -> HeadersRead:
    """Everything that headers tell. What is opened is left to `opened`. `device`: as of `load_model`."""
    model_config, quantisation = read_model_config(folder, trust_remote_code=config.trust_remote_code)
    index = CheckpointIndex.open(folder, quantisation)
    opened.callback(index.close)
    model = build_on_meta(model_config, index, trust_remote_code=config.trust_remote_code)
    config = _settled(config, model, device)
    assert config.context_length is not None, "settled"
    mapping = KeyMapping(model)
    targets = mapping.targets(index.tensors)
    experts, expert_keys = map_experts(model, index, mapping, targets)
    left_out = sort_out(model, index, mapping, targets, expert_keys)
    targets = {key: target for key, target in targets.items() if key not in left_out.kinds}
    counters = Counters()
    disk = DiskTier(index.files, io=config.io, counters=counters)
    opened.callback(disk.close)
    _take_experts_out(model, experts)
    return HeadersRead(
        config=config, context_length=config.context_length, quantisation=quantisation, index=index, model=model,
        mapping=mapping, targets=targets, left_out=left_out, experts=experts, expert_keys=expert_keys, disk=disk,
        counters=counters,
    )  # fmt: skip


def _take_experts_out(model: PreTrainedModel, experts: ExpertIndex) -> None:
    """Remove the streamed parameters and bind each experts module to its number."""
    for layer_idx, (_, module) in enumerate(experts_modules(model)):
        params = streamed_parameters(module)
        first = next(iter(params.values()))
        for name in params:
            del module._parameters[name]
        bind(module, LayerBinding(layer_idx, first.shape[0], first.dtype, halves=experts.layers[layer_idx].halves))
    if not all(isinstance(module, AdaptedExperts) for _, module in experts_modules(model)):
        model.set_experts_implementation(SEAM_NAME)


def _settled(config: EngineConfig, model: PreTrainedModel, device: Device | None) -> EngineConfig:
    """`config` with everything settled but memory, which is divided when it is known."""
    # A simulated device would gain nothing by it.
    may_compile = not model.config.is_encoder_decoder and device is not None and device.torch_device.type == "cuda"
    facts = AutoFacts(
        has_device=device is not None, may_compile=may_compile,
        longest_context=longest_context(model), total_ram_bytes=total_ram_bytes(),
    )  # fmt: skip
    return complete_config(config, facts).config


def check_headers(folder: Path, config: EngineConfig) -> None:
    """Raise what `load_model` would raise before it reads a weight; `folder` may have holes in their place."""
    with ExitStack() as opened:
        read_headers(folder, config, opened, None)
