"""Devices and their pools: slots, what happens when memory is short, and why there is no device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inline_copier import InlineCopier
from makers import one_line

from offmoe.core.errors import BudgetError, DeviceError, UsageError
from offmoe.tiers.cuda import why_no_cuda
from offmoe.tiers.cuda_events import as_device_error
from offmoe.tiers.device import SLOT_ALIGN_BYTES, DevicePool, SimulatedDevice
from offmoe.tiers.open_device import open_device

CPU = torch.device("cpu")


def simulated(capacity_bytes: int) -> SimulatedDevice:
    return SimulatedDevice(1e9, capacity_bytes=capacity_bytes, copier=InlineCopier())


def test_slots_are_aligned_and_apart() -> None:
    pool = simulated(1 << 20).make_pool(5, 1000)
    assert pool.slot_bytes == 1024 and pool.num_bytes == 5 * 1024
    for slot in range(5):
        assert pool.tensor(slot).data_ptr() % SLOT_ALIGN_BYTES == 0
        pool.tensor(slot).fill_(slot)
    assert torch.equal(pool.slab, torch.arange(5, dtype=torch.uint8).repeat_interleave(1024))
    assert repr(pool) == "<DevicePool [5 slots of 1.0 KiB]>"
    pool.close()
    with pytest.raises(AssertionError, match="closed"):
        pool.tensor(0)


def test_a_pool_made_in_inference_mode_can_be_written_outside() -> None:
    with torch.inference_mode():
        pool = DevicePool(CPU, num_slots=1, slot_bytes=256)
    pool.tensor(0).zero_()


@given(num_slots=st.integers(0, 300), free_slots=st.integers(0, 300), min_slots=st.integers(0, 300))
def test_a_pool_shrinks_to_what_there_is_room_for(num_slots: int, free_slots: int, min_slots: int) -> None:
    device = simulated(free_slots * 256)
    if free_slots < min(min_slots, num_slots):
        with pytest.raises(BudgetError) as caught:
            device.make_pool(num_slots, 256, min_slots=min_slots)
        assert f"for {min(min_slots, num_slots)} expert slots of 256 B, the fewest that work" in one_line(caught)
        assert device.free_bytes() == free_slots * 256
        return
    pool = device.make_pool(num_slots, 256, min_slots=min_slots)
    assert min(min_slots, num_slots) <= pool.num_slots <= min(num_slots, free_slots)
    assert pool.num_slots == num_slots or pool.num_slots > free_slots - max(1, num_slots // 32) - 1
    assert pool.wanted_slots == num_slots
    assert device.free_bytes() == (free_slots - pool.num_slots) * 256
    pool.close()
    assert device.free_bytes() == free_slots * 256


def test_without_a_minimum_all_slots_are_needed() -> None:
    device = simulated(10 * 256)
    with pytest.raises(BudgetError, match="for 11 expert slots"):
        device.make_pool(11, 256)
    pool = device.make_pool(11, 256, min_slots=2)
    assert repr(pool) == "<DevicePool [10 slots (wanted 11) of 256 B]>"


def test_a_simulated_device_tells_its_memory() -> None:
    device = simulated(10 << 20)
    device.taken_bytes = 4 << 20
    assert (device.free_bytes(), device.total_bytes()) == (6 << 20, 10 << 20)
    assert repr(device) == "<SimulatedDevice [6.0 MiB of 10.0 MiB free]>"
    assert device.pin(torch.zeros(1)) is None
    device.unpin()
    device.close()


def test_a_simulated_device_has_a_link() -> None:
    device = SimulatedDevice(1e9)
    pool = device.make_pool(2, 100)
    device.copier.copy([(torch.ones(100, dtype=torch.uint8), pool.tensor(1)[:100])]).wait()
    assert pool.slab.sum() >= 100 and pool.tensor(1)[:100].eq(1).all()
    device.close()


class Cuda:
    """What torch would say of CUDA on some machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, built: bool = True, num: int = 0, error: str = "") -> None:
        self._error = error
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda idx: f"GPU {idx}")
        monkeypatch.setattr(torch.cuda, "init", self._init)

    def _init(self) -> None:
        if self._error:
            raise RuntimeError(self._error)


TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new\nversion from the URL: http://www.nvidia.com/Download/index.aspx"
)


def device_error(name: str) -> str:
    with pytest.raises(DeviceError) as caught:
        open_device(name)
    return one_line(caught)


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch, built=False)
    assert "was built without CUDA; install one with it" in device_error("cuda")
    assert open_device("auto") is None and open_device("cpu") is None


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch, error=TOO_OLD)
    message = device_error("cuda:0")
    assert "(The NVIDIA driver on your system is too old (found version 11040))" in message
    assert message.endswith("install or update the NVIDIA driver, or use --device cpu")
    assert open_device("auto") is None


def test_a_driver_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch)
    assert "CUDA_VISIBLE_DEVICES" in device_error("cuda")


def test_a_number_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch, num=2)
    assert device_error("cuda:2") == "there is no cuda:2 here; known: cuda:0 GPU 0, cuda:1 GPU 1"


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_a_device_that_fails_its_first_computation(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*size: int, device: torch.device) -> torch.Tensor:
        raise RuntimeError(f"CUDA error: no kernel image is available on {device}\nCUDA kernel errors might be...")

    Cuda(monkeypatch, num=2)
    assert why_no_cuda() is None
    monkeypatch.setattr(torch, "ones", fail)
    index = 1 if name == "cuda:1" else 0
    assert device_error(name).startswith(
        f"cuda:{index} cannot be used (CUDA error: no kernel image is available on cuda:{index}); "
    )


@pytest.mark.parametrize("name", ["cuda:x", "cuda:", "mps", "", "CUDA", "cuda:-1", "cuda:1234"])
def test_unknown_devices_list_the_known(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_device(name)
    assert f"device is {name!r}; known: auto, cpu, cuda, cuda:0" in one_line(caught)


@pytest.mark.parametrize("text", ["", "CUDA error: unspecified launch failure\nDevice-side \x1b assertions", "x" * 900])
def test_a_lost_device_is_told_in_one_line(text: str) -> None:
    error = as_device_error(RuntimeError(text), torch.device("cuda", 3), "copying")
    assert str(error).isprintable() and len(str(error)) < 400
    assert str(error).startswith("cuda:3 failed while copying (")
