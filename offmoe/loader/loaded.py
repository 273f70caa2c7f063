"""A model that runs, and the parts that serve its experts. Made by `load.load_model`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offmoe.cache.expert_cache import ExpertCache
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.core.config import EngineConfig
from offmoe.hf.internals import experts_modules
from offmoe.hf.replace import ReplacedModules
from offmoe.hf.seam import ClosedExecutor, ExpertsExecutor, attach
from offmoe.kv.layout import CacheLayout
from offmoe.loader.calls import OneCallAtATime
from offmoe.loader.serving import Serving
from offmoe.memory.budget import MemoryPlan
from offmoe.moe.uncached import UncachedExecutor
from offmoe.tiers.disk import DiskTier
from offmoe.tiers.host import HostPool

if TYPE_CHECKING:
    from offmoe.tiers.device import Device, DevicePool

Pools = tuple[HostPool, "DevicePool | None"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A running model and the parts that serve its experts. `device` is None when it runs on the CPU, in RAM. `config`
    is settled.
    """

    config: EngineConfig

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    index: CheckpointIndex
    experts: ExpertIndex
    disk: DiskTier
    pools: Pools
    device: Device | None
    serving: Serving
    native: ReplacedModules | None
    calls: OneCallAtATime
    plan: MemoryPlan
    chunkable: bool
    layout: CacheLayout

    @property
    def context_length(self) -> int:
        """Tokens of prompt and reply that memory was set aside for."""
        assert self.config.context_length is not None, "settled"
        return self.config.context_length

    @property
    def cache(self) -> ExpertCache:
        """The slots of the tier that computes."""
        return self.serving.cache

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """Serve experts without the cache for a while."""
        rows = self.serving.cpu_backend if self.device is None else None
        attach_all(self.model, UncachedExecutor(self.experts, self.index.files, rows))
        try:
            yield
        finally:
            attach_all(self.model, self.serving.executor)

    def close(self) -> None:
        """Take the experts away from the model, end threads, give back memory, close files.

        All of it is tried, whatever fails: a lost device fails every call.
        """
        host_pool, device_pool = self.pools
        with ExitStack() as last_to_first:
            last_to_first.callback(self.index.close)
            last_to_first.callback(host_pool.close)
            if device_pool is not None:
                last_to_first.callback(device_pool.close)
            if self.device is not None:  # ends its copies: pools are closed after it
                last_to_first.callback(self.device.close)
            last_to_first.callback(self.serving.close)
            last_to_first.callback(self.disk.close)
            attach_all(self.model, ClosedExecutor())


def attach_all(model: PreTrainedModel, executor: ExpertsExecutor) -> None:
    """From now on `executor` computes every experts module of `model`."""
    for _, module in experts_modules(model):
        attach(module, executor)
