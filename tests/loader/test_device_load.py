"""An engine on a device, simulated: what is planned, what others may take of it, and what its failures become."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import PROMPT, QUARTER, TINY_EXPERTS, assert_at_rest, leaves_nothing, open_tiny, save_tiny
from logs import logs_warning
from makers import one_line

import offmoe
from offmoe.core.errors import BudgetError, DeviceError, EngineClosedError, OffmoeError, UsageError
from offmoe.core.units import GIB, MIB, parse_size
from offmoe.hf.internals import experts_modules
from offmoe.loader import load as load_module
from offmoe.loader import resident
from offmoe.memory.budget import CUDA_CONTEXT_BYTES, DevicePlan, plan_device
from offmoe.tiers import cuda as cuda_module
from offmoe.tiers.device import SimulatedDevice


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with leaves_nothing():
        yield


class Device(SimulatedDevice):
    """A fast link; says whether it was closed."""

    closed = False

    def __init__(self, capacity_bytes: int = 4 * GIB) -> None:
        super().__init__(1e12, capacity_bytes=capacity_bytes)

    def close(self) -> None:
        self.closed = True
        super().close()


def open_on(folder: Path, device: Device, **options: Any) -> offmoe.Engine:
    """Misses are copied: nothing depends on how fast this machine is."""
    return open_tiny(folder, **{"miss": "stream", "simulated": device, **options})


def generate(engine: offmoe.Engine, prompt: list[int] = PROMPT) -> tuple[int, ...]:
    return engine.generate(prompt, max_new_tokens=4, temperature=0, ignore_eos=True).token_ids


@pytest.mark.parametrize("vram", ["auto", "1GiB"])
def test_the_same_ids_and_a_plan_of_both_memories(folder: Path, vram: str) -> None:
    with open_tiny(folder) as engine:
        expected = generate(engine)
        assert not any(name.startswith("device") or name == "vram_bytes" for name in engine.stats())
    device = Device()
    with open_on(folder, device, vram=vram) as engine:
        assert generate(engine) == expected
        plan, totals = engine.plan, engine.stats()
        assert plan.device is not None and plan.computing_slots == plan.device.num_slots == QUARTER
        assert (plan.num_slots, plan.resident_bytes, plan.kv_bytes) == (TINY_EXPERTS, 0, 0)
        assert plan.line().startswith(f"{QUARTER} of {TINY_EXPERTS} experts on the device")
        assert (totals["device"], totals["device_slots"], totals["device_peak_bytes"]) == ("simulated", QUARTER, None)
        assert (
            totals["device_planned_bytes"] == plan.device.total_bytes <= totals["vram_bytes"] == plan.device.vram_bytes
        )
        assert totals["experts_cached"] == QUARTER and totals["ram_bytes"] == 4 * GIB
        assert_at_rest(engine)
    assert device.closed


@pytest.mark.parametrize("sampling", [{"temperature": 0.8, "seed": 3}, {"temperature": 0, "repetition_penalty": 1.3}])
def test_sampling_is_that_of_the_cpu(folder: Path, sampling: dict[str, Any]) -> None:
    with open_tiny(folder) as engine:
        expected = engine.generate(PROMPT, max_new_tokens=6, **sampling).token_ids
    with open_on(folder, Device()) as engine:
        assert engine.generate(PROMPT, max_new_tokens=6, **sampling).token_ids == expected


def refuse(folder: Path, device: Device, error: type[OffmoeError] = BudgetError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        open_tiny(folder, simulated=device, **options)
    assert device.closed
    return one_line(caught)


def test_a_load_that_fails_closes_the_device(folder: Path) -> None:
    refuse(folder, Device(), UsageError, context_length=999)
    refuse(folder, Device(), BudgetError, expert_slots=1)


def test_the_smallest_vram_that_is_advised_works(folder: Path) -> None:
    message = refuse(folder, Device(), vram="1kB", expert_slots=None)
    found = re.search(r"vram is 1000 B, this model needs (\d+) MiB: .*use --vram (\w+),", message)
    assert found and found.group(2) == f"{found.group(1)}MiB", message
    with open_on(folder, Device(), vram=found.group(2), expert_slots=None) as engine:
        assert generate(engine)
        assert engine.plan.device is not None and engine.plan.device.total_bytes <= parse_size(found.group(2))


def test_a_device_that_is_too_small(folder: Path) -> None:
    message = refuse(folder, Device(100_000))
    assert "97.7 KiB can be had" in message and "--device cpu" in message and "--vram" not in message


def test_vram_beyond_what_is_free_is_said(folder: Path) -> None:
    with logs_warning(r"vram is 1.00 GiB, the device has 512.0 MiB to give: \d+ expert slots"):
        engine = open_on(folder, Device(512 * MIB), vram="1GiB")
    with engine:
        assert engine.stats()["vram_bytes"] == 512 * MIB


def test_ram_must_hold_a_batch_of_weights_on_their_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "load_peak_bytes", lambda *_: 2 * GIB)
    message = refuse(folder, Device(), ram="1GiB")
    assert "loading this model needs" in message and "2.00 GiB of weights on their way" in message


def taken_before_the_pool(device: Device, left_bytes: Callable[[DevicePlan], int]) -> Callable[..., DevicePlan]:
    """The check right before the pool, made when another program has left `left_bytes(plan)` of the device."""
    real = load_module.fit_to_free

    def check(plan: DevicePlan, *args: Any, **options: Any) -> DevicePlan:
        device.taken_bytes = device.total_bytes() - left_bytes(plan)
        return real(plan, *args, **options)

    return check


def test_memory_taken_while_loading_shrinks_the_pool(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    check = taken_before_the_pool(device, lambda plan: plan.coming_bytes + 5 * plan.slot_bytes)
    monkeypatch.setattr(load_module, "fit_to_free", check)
    with logs_warning(r"memory was taken meanwhile: 5 expert slots of .* instead of 12"):
        engine = open_on(folder, device, expert_slots=12, vram="1GiB")
    with engine:
        assert generate(engine)
        assert engine.stats()["device_slots"] == engine.plan.computing_slots == 5


def test_a_pool_below_the_fewest_slots_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    check = taken_before_the_pool(device, lambda plan: plan.coming_bytes + plan.slot_bytes)
    monkeypatch.setattr(load_module, "fit_to_free", check)
    message = refuse(folder, device, vram="1GiB")
    assert "left" in message and "2 experts of" in message and "--device cpu" in message


def test_memory_taken_while_weights_are_read_is_not_planned_with(folder: Path) -> None:
    device = Device()
    left = 2 * MIB

    def take(stage: str, done: int, total: int) -> None:
        device.taken_bytes = device.total_bytes() - left

    with logs_warning(r"vram is 1.00 GiB, the device has 2.\d MiB to give"):
        engine = open_on(folder, device, vram="1GiB", expert_slots=None, context_length=64, progress=take)
    with engine:
        plan = engine.plan.device
        assert plan is not None and plan.vram_bytes < 3 * MIB
        assert generate(engine)


def test_weights_go_to_the_device_batch_by_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than a batch is on its way, whatever the model's size."""
    there: set[str] = set()
    batches: list[int] = []
    real = resident._move_parameters

    def move(model: torch.nn.Module, device: torch.device) -> None:
        read = {name: p.nbytes for name, p in model.named_parameters() if not p.is_meta and name not in there}
        there.update(read)
        batches.append(sum(read.values()))
        real(model, device)  # type: ignore[arg-type]

    monkeypatch.setattr(resident, "_move_parameters", move)
    monkeypatch.setattr(resident, "BATCH_BYTES", 20_000)
    peaks: list[int] = []
    real_peak = load_module.load_peak_bytes
    monkeypatch.setattr(load_module, "load_peak_bytes", lambda *args: peaks.append(real_peak(*args)) or peaks[-1])
    with open_on(folder, Device()) as engine:
        assert generate(engine)
        assert there == {name for name, _ in engine.model.named_parameters()}
    assert len(batches) > 4 and max(batches) <= peaks[0] < sum(batches)
    batches.clear()
    with open_tiny(folder):
        assert not batches, "nothing moves without a device"


# Failures while running. The last experts module fails, so that the layers before it have advanced.


def on_experts_call(engine: offmoe.Engine, hook: Callable[[int], None]) -> None:
    """`hook(num_tokens)` runs before the last layer's experts do."""
    module = experts_modules(engine.model)[-1][1]
    module.register_forward_pre_hook(lambda _, args: hook(args[0].shape[-2]))


class NoMemory:
    """Fails calls of more than `limit` tokens, at most `times` times; keeps what was asked for."""

    def __init__(self, limit: int, times: int = 1) -> None:
        self.limit, self.times = limit, times
        self.sizes: list[int] = []

    def __call__(self, num_tokens: int) -> None:
        self.sizes.append(num_tokens)
        if num_tokens > self.limit and self.times:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_a_full_device_halves_the_chunk_for_good(folder: Path) -> None:
    with open_tiny(folder) as engine:
        expected = generate(engine)
    with open_on(folder, Device(), prefill_chunk=8) as engine:
        memory = NoMemory(limit=4)
        on_experts_call(engine, memory)
        with logs_warning(r"simulated has no memory for 8 prompt tokens at once \(.* free\); going on with 4"):
            assert generate(engine) == expected
        assert memory.sizes == [8, 4, 4, 2, 1, 1, 1]
        assert_at_rest(engine)
        memory.sizes.clear()
        assert generate(engine) == expected
        assert memory.sizes[:3] == [4, 4, 2]


def test_a_later_piece_is_redone_on_what_the_cache_held(folder: Path) -> None:
    prompt = [*PROMPT, *PROMPT[:6]]
    with open_tiny(folder) as engine:
        expected = generate(engine, prompt)
    with open_on(folder, Device(), prefill_chunk=6) as engine:
        calls = NoMemory(limit=5, times=0)
        on_experts_call(engine, lambda n: setattr(calls, "times", int(len(calls.sizes) == 1)))
        on_experts_call(engine, calls)
        with logs_warning("6 prompt tokens"):
            assert generate(engine, prompt) == expected
        assert calls.sizes[:6] == [6, 6, 3, 3, 3, 1]


def test_a_device_that_stays_full_is_an_error_with_the_numbers(folder: Path) -> None:
    with open_on(folder, Device(), prefill_chunk=8) as engine:
        expected = generate(engine)
        memory = NoMemory(limit=2, times=2)
        on_experts_call(engine, memory)
        with logs_warning("going on with 4"), pytest.raises(BudgetError) as caught:
            engine.generate(PROMPT, max_new_tokens=4, reuse=False)
        assert re.search(
            r"no memory for 4 prompt tokens at once, after the chunk was halved: .* are free; close other programs",
            one_line(caught),
        )
        assert_at_rest(engine)
        assert generate(engine) == expected


def test_a_prompt_that_may_not_be_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_on(folder, Device())
    with engine:
        assert engine._halving_chunk is not None
        monkeypatch.setattr(engine._halving_chunk, "_divisible", False)
        on_experts_call(engine, NoMemory(limit=4))
        with pytest.raises(BudgetError, match="no memory for 10 prompt tokens at once: "):
            generate(engine)


def test_a_device_that_is_full_while_decoding(folder: Path) -> None:
    with open_on(folder, Device()) as engine:
        expected = generate(engine)
        memory = NoMemory(limit=0, times=0)
        on_experts_call(engine, lambda n: setattr(memory, "times", int(n == 1 and len(memory.sizes) == 2)))
        on_experts_call(engine, memory)
        with pytest.raises(BudgetError, match=r"simulated is out of memory, .* are free; close other programs"):
            generate(engine)
        assert_at_rest(engine)
        assert generate(engine) == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
        DeviceError("cuda:0 failed while copying (unspecified launch failure); start again"),
    ],
)
def test_a_lost_device_closes_the_engine(folder: Path, error: Exception) -> None:
    device = Device()
    engine = open_on(folder, device)

    def fail(num_tokens: int) -> None:
        raise error

    on_experts_call(engine, fail)
    with pytest.raises(DeviceError) as caught:
        generate(engine)
    message = one_line(caught)
    assert "failed while" in message and "start again" in message and "CUDA kernel errors" not in message
    assert device.closed and repr(engine).endswith("[closed]>")
    with pytest.raises(EngineClosedError, match="closed"):
        generate(engine)
    engine.close()


def test_what_is_not_the_devices_fault_is_raised_as_it_is(folder: Path) -> None:
    def fail(num_tokens: int) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with open_on(folder, Device()) as engine:
        on_experts_call(engine, fail)
        with pytest.raises(RuntimeError, match="shapes"):
            generate(engine)
    with open_tiny(folder) as engine:
        on_experts_call(engine, NoMemory(limit=4))
        with pytest.raises(torch.OutOfMemoryError):
            generate(engine)


def test_a_device_that_is_full_while_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(resident, "_move_parameters", fail)
    assert "out of memory" in refuse(folder, Device())


def test_a_pool_that_is_refused_shrinks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check and the allocation too, others may be faster."""
    device = Device()
    real = load_module.fit_to_free

    def late(plan: DevicePlan, *args: Any, **options: Any) -> DevicePlan:
        fitting = real(plan, *args, **options)
        device.taken_bytes = device.total_bytes() - 7 * plan.slot_bytes
        return fitting

    monkeypatch.setattr(load_module, "fit_to_free", late)
    with logs_warning(r"7 expert slots of .* instead of 12"):
        engine = open_on(folder, device, expert_slots=12)
    with engine:
        assert generate(engine) and engine.plan.computing_slots == 7


def test_what_is_planned_is_what_is_counted() -> None:
    plan = plan_device(
        vram_bytes=None, free_bytes=8 * GIB, context_bytes=MIB, resident_bytes=GIB, kv_bytes=MIB, workspace_bytes=MIB,
        slack_bytes=MIB, slot_bytes=MIB, num_experts=100, top_k=2, expert_slots=None,
    )  # fmt: skip
    assert plan.total_bytes == GIB + 104 * MIB


@pytest.mark.parametrize("context", [0, 600 * MIB])
def test_what_the_driver_takes_is_inside_vram(folder: Path, context: int) -> None:
    """The budget is what the whole process may take: slots go where the driver's context is larger."""
    device = Device()
    device.context_bytes = context
    vram = GIB
    with open_on(folder, device, vram="1GiB", expert_slots=None) as engine:
        plan, totals = engine.plan.device, engine.stats()
        assert plan is not None and plan.context_bytes == context == totals["device_driver_bytes"]
        assert plan.total_bytes <= plan.vram_bytes == vram
        pools = sum(pool.num_bytes for pool in device._pools)
        assert pools + context + plan.resident_bytes + plan.coming_bytes <= vram
    device = Device()
    device.context_bytes = vram
    with pytest.raises(BudgetError, match="vram"):
        open_on(folder, device, vram="1GiB")


def test_a_drivers_memory_is_what_is_missing_beside_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of two; another process holds 3 GiB of it all the time."""
    free = {"other": GIB, "this": 5 * GIB}
    device = object.__new__(cuda_module.CudaDevice)
    device.torch_device, device._free_before = torch.device("cuda", 0), dict(free)
    monkeypatch.setattr(cuda_module, "free_by_uuid", lambda: free)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="this"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: GIB)
    free["this"] -= GIB + 430 * MIB
    assert device.driver_bytes() == 430 * MIB
    device._free_before = {}
    assert device.driver_bytes() == CUDA_CONTEXT_BYTES
