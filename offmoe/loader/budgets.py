"""Division of what the user allows: once before weights are read, to refuse in time, and once when they are there."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from offmoe.attention.sinks import EAGER, SINKS
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.core.config import EngineConfig
from offmoe.core.errors import BudgetError
from offmoe.core.units import format_bytes
from offmoe.formats.layout import device_slot_bytes
from offmoe.formats.packed_sizes import loading_bytes
from offmoe.kv.probe import ModelProbe, predict_kv_bytes
from offmoe.loader.packed_weights import WeightPacker
from offmoe.loader.resident import resident_bytes
from offmoe.machine.memory import available_ram_bytes, rss_bytes
from offmoe.machine.reservations import Reservation, one_at_a_time, outstanding
from offmoe.memory.budget import DevicePlan, MemoryPlan, auto_ram
from offmoe.memory.planner import Machine, MemoryPlanner, ModelSizes
from offmoe.memory.shape import ModelShape, shape_of

if TYPE_CHECKING:
    from offmoe.tiers.device import Device

_log = logging.getLogger(__name__)

# What libraries grow by when a model runs for the first time in a process (measured: 18 MiB).
FIRST_RUN_BYTES = 24 << 20


class Budgets:
    """Measures what `MemoryPlanner` divides. Made when the model is built and no weight is read."""

    def __init__(
        self, model: PreTrainedModel, experts: ExpertIndex, config: EngineConfig, context_length: int, *,
        slot_bytes: int, load_bytes: int, baseline_bytes: int, device: Device | None, reservation: Reservation,
        staging_bytes: int = 0, packer: WeightPacker | None = None,
    ) -> None:  # fmt: skip
        """`slot_bytes` of a RAM slot; `load_bytes` pass through RAM at once on their way to `device`, `staging_bytes`
        on the way to packed slots. `packer` will pack
        resident weights.

        `reservation` tells engines that load beside what this one will take, first as foreseen and then as planned.
        """
        self._model, self._config, self._context_length = model, config, context_length
        self._baseline_bytes, self._device, self._reservation = baseline_bytes, device, reservation
        resident = resident_bytes(model)
        if packer is not None:
            saved, largest = packer.foreseen()
            load_bytes = loading_bytes(resident - saved, resident, largest)
            resident -= saved
        self._sizes = ModelSizes(
            shape=model_shape(model), resident_bytes=resident, load_bytes=load_bytes,
            slot_bytes=slot_bytes, device_slot_bytes=device_slot_bytes(experts), num_experts=experts.num_experts,
            top_k=experts.top_k, staging_bytes=staging_bytes,
        )  # fmt: skip
        self._runtime_bytes = max(0, rss_bytes() - baseline_bytes)
        self._free_bytes = device.free_bytes() if device is not None else 0
        self._foreseen_kv_bytes = predict_kv_bytes(model, context_length)
        with one_at_a_time():
            self._others_bytes = sum(claim.num_bytes for claim in outstanding() if claim.pid != os.getpid())
            self._ram = config.ram if config.ram is not None else baseline_room(baseline_bytes)
            with contextlib.suppress(BudgetError):  # `refuse_hopeless` raises it
                reservation.reserve(self._division(self._foreseen_kv_bytes).plan().total_bytes)

    def refuse_hopeless(self) -> None:
        """Raise BudgetError before gigabytes are read when the model cannot fit at its most modest."""
        division = self._division(self._foreseen_kv_bytes)
        try:
            division.plan_most_modest()
        except BudgetError:  # once more, so that the budget in the message is one that works
            try:
                division.with_runtime(self._runtime_bytes + FIRST_RUN_BYTES).plan_most_modest()
            except BudgetError as error:
                if self._config.ram is not None or not self._others_bytes:
                    raise
                others = format_bytes(self._others_bytes)
                raise BudgetError(f"{error}; {others} of what is free are kept for other offmoe processes") from None

    def weights_were_packed(self) -> None:
        """The resident weights take less than before."""
        self._sizes = dataclasses.replace(self._sizes, resident_bytes=resident_bytes(self._model))

    def plan(self, probe: ModelProbe) -> MemoryPlan:
        """The plan, now that the weights are loaded and the model has run once. Raises BudgetError.

        What others have taken of the device meanwhile is not planned with.
        """
        resident = self._sizes.resident_bytes
        if self._device is not None:
            self._free_bytes = min(self._free_bytes, self._device.free_bytes() + resident)
        in_ram = self._device is None or self._device.torch_device.type == "cpu"  # a simulated device is in RAM
        self._runtime_bytes = max(0, rss_bytes() - self._baseline_bytes - (resident if in_ram else 0))
        plan = self._division(probe.kv_bytes, chunkable=probe.chunkable).plan()
        self._reservation.reserve(plan.total_bytes)
        if plan.device is not None and self._config.vram is not None and plan.device.vram_bytes < self._config.vram:
            _log.warning(
                "vram is %s, the device has %s to give: %d expert slots", format_bytes(self._config.vram),
                format_bytes(plan.device.vram_bytes), plan.device.num_slots,
            )  # fmt: skip
        return plan

    def _division(self, kv_bytes: int, *, chunkable: bool = True) -> MemoryPlanner:
        machine = Machine(
            ram_bytes=self._ram, runtime_bytes=self._runtime_bytes,
            vram_free_bytes=None if self._device is None else self._free_bytes,
            is_cuda=self._device is not None and self._device.torch_device.type == "cuda",
            driver_bytes=None if self._device is None else self._device.driver_bytes(),
        )  # fmt: skip
        return MemoryPlanner(
            sizes=self._sizes, machine=machine, config=self._config, context_length=self._context_length,
            kv_bytes=kv_bytes, chunkable=chunkable,
        )  # fmt: skip


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The shape of a model that was built, with or without weights."""
    config = model.config.get_text_config()
    vocab = int(config.vocab_size)
    matrices = [p.nbytes for p in model.parameters() if p.dim() == 2 and vocab not in p.shape]
    attention = getattr(config, "_attn_implementation", "sdpa")
    renamed = {name: getattr(config, own, None) for name, own in config.attribute_map.items()}
    return shape_of(
        {**renamed, **config.to_dict()}, item_bytes=model.dtype.itemsize,
        eager_attention=attention == EAGER, eager_on_device=attention in (EAGER, SINKS),
        largest_matrix_bytes=max(matrices, default=0),
    )  # fmt: skip


def fit_to_free(plan: DevicePlan, device: Device, *, top_k: int) -> DevicePlan:
    """`plan` with fewer slots, and a warning, when others have taken device memory since it was made.

    Called right before the pool is allocated: the resident weights are there, what is `coming_bytes` is not. Raises
    BudgetError when fewer than `top_k` slots are left.
    """
    free_bytes = device.free_bytes()
    room = (free_bytes - plan.coming_bytes) // plan.slot_bytes
    if room >= plan.num_slots:
        return plan
    if room < top_k:
        need = plan.coming_bytes + top_k * plan.slot_bytes
        raise BudgetError(
            f"the device has {format_bytes(free_bytes)} left, {format_bytes(need)} are needed for KV cache, workspace "
            f"and {top_k} experts of {format_bytes(plan.slot_bytes)}; another program may have taken the rest: close "
            "it, or use --device cpu"
        )
    return shrink(plan, room)


def shrink(plan: DevicePlan, num_slots: int) -> DevicePlan:
    """`plan` with `num_slots` slots, fewer than planned, and a warning that says so."""
    _log.warning(
        "device memory was taken meanwhile: %d expert slots of %s instead of %d", num_slots,
        format_bytes(plan.slot_bytes), plan.num_slots,
    )  # fmt: skip
    return dataclasses.replace(plan, num_slots=num_slots)


def baseline_room(baseline_bytes: int) -> int:
    """Bytes that `ram="auto"` allows: free memory, plus what the libraries have taken already."""
    return auto_ram(available_ram_bytes() + max(0, rss_bytes() - baseline_bytes))
