"""Which CUDA calls the link makes, in which order, on a recorder in place of torch.cuda. tests/gpu has the real one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from makers import one_line

from offmoe.core.errors import DeviceError
from offmoe.tiers.cuda import CudaDevice, CudaLink
from offmoe.tiers.open_device import open_device

GPU = torch.device("cuda", 0)


class Recorder:
    """Streams and events that write down what is asked of them; copies happen at once, in host memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.current = "main"
        self.refusal: str | None = None
        self.lost = False
        self.num_events = 0
        recorder = self

        class Event:
            def __init__(self, blocking: bool = False) -> None:
                self.name = "sleepy" if blocking else "event"
                recorder.num_events += 1

            def record(self, stream: Stream) -> None:
                recorder.call(f"record {self.name} on {stream.name}")

            def query(self) -> bool:
                return recorder.call("query")

            def synchronize(self) -> None:
                recorder.call("wait on host")

        class Stream:
            def __init__(self, device: torch.device, priority: int = 0) -> None:
                self.name = {0: "side", -1: "urgent", 1: "main"}[priority]

            def wait_event(self, event: Event) -> None:
                recorder.call(f"{self.name} waits")

            def synchronize(self) -> None:
                recorder.call(f"synchronize {self.name}")

        @contextlib.contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, self.current = self.current, chosen.name
            yield
            self.current = before

        def copy_(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            assert non_blocking and torch.is_inference_mode_enabled()
            self.call(f"copy {src.nbytes} on {self.current}")
            dst.view(-1)[:] = src
            return dst

        self.runtime = SimpleNamespace(
            cudaHostRegister=lambda pointer, num_bytes, flags: self._register(num_bytes),
            cudaHostUnregister=lambda pointer: self.calls.append("unregister"),
            cudaGetErrorString=lambda code: self.refusal,
            cudaError=SimpleNamespace(success=0),
        )
        ones = torch.ones
        fakes: dict[str, Any] = {
            "Event": Event, "Stream": Stream, "stream": stream, "device": lambda device: contextlib.nullcontext(),
            "current_stream": lambda device: Stream(device, 1), "is_available": lambda: True, "device_count": lambda: 1,
            "get_device_name": lambda index: "A GPU", "cudart": lambda: self.runtime,
            "synchronize": lambda device: self.call("synchronize all"), "empty_cache": lambda: None,
            "memory_reserved": lambda device: 70, "memory_allocated": lambda device: 50,
            "mem_get_info": lambda device: (1000, 4000) if self.call("query") else None,
            "get_device_properties": lambda device: SimpleNamespace(total_memory=4000),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch, "ones", lambda num, device: self.call("compute") and ones(num))
        monkeypatch.setattr(torch.Tensor, "copy_", copy_)

    def call(self, what: str) -> bool:
        if self.lost:
            raise RuntimeError("CUDA error: unspecified launch failure\nmore")
        self.calls.append(what)
        return True

    def _register(self, num_bytes: int) -> int:
        self.calls.append(f"register {num_bytes}")
        return 0 if self.refusal is None else 2

    def take(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.fixture
def device(recorder: Recorder) -> Iterator[CudaDevice]:
    made = open_device("cuda")
    assert isinstance(made, CudaDevice)
    recorder.take()
    yield made
    recorder.lost = False
    made.close()


def part(num_bytes: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((num_bytes,), 7, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)


def test_a_copy_begins_behind_its_mark_and_the_caller_goes_on_behind_it(device: CudaDevice, recorder: Recorder) -> None:
    src, dst = part()
    assert device.pin(src) is None
    mark = device.copier.mark()
    assert recorder.take() == ["register 8", "record event on main"]
    ticket = device.copier.copy([(src, dst), (src[:3], dst[:3])], urgent=True, after=mark)
    assert recorder.take() == ["urgent waits", "copy 8 on urgent", "copy 3 on urgent", "record sleepy on urgent"]
    ticket.wait()
    assert recorder.take() == ["main waits"]
    assert ticket.done() and torch.equal(src, dst)
    device.copier.copy([(src, dst)], urgent=False).wait()
    assert recorder.take() == ["query", "copy 8 on side", "record sleepy on side", "main waits"]


def test_a_thousand_copies_take_the_same_few_events(device: CudaDevice, recorder: Recorder) -> None:
    """Two made for each copy before: a mark and an arrival. Of 1 MiB, 16 are on the link's queue at most."""
    src, dst = part(1 << 20)
    assert device.pin(src) is None
    mark = device.copier.mark()
    for number in range(1000):
        ticket = device.copier.copy([(src, dst)], urgent=number % 2 == 0, after=mark)
        ticket.wait()
        assert ticket.done()
        mark = device.copier.mark()
    assert recorder.num_events <= 24
    assert sum("record" in call for call in recorder.take()) == 2001


def test_an_event_that_somebody_holds_is_not_recorded_again(device: CudaDevice, recorder: Recorder) -> None:
    marks = [device.copier.mark() for _ in range(10)]
    assert recorder.num_events == len({id(mark.event) for mark in marks}) == 10
    del marks[3:]
    marks += [device.copier.mark() for _ in range(8)]
    assert recorder.num_events == len({id(mark.event) for mark in marks}) == 11


def test_what_is_not_pinned_is_queued_by_the_worker(device: CudaDevice, recorder: Recorder) -> None:
    """The pinned ring is refused here, so the driver stages."""
    assert repr(device) == "<CudaDevice cuda:0 [A GPU | 0 slabs pinned]>"
    assert repr(device.copier).startswith("<RingCopier [no staging |")
    src, dst = part()
    device.copier.copy([(src, dst)]).wait()
    assert recorder.take() == ["copy 8 on urgent", "record sleepy on urgent", "main waits"]


def test_a_pinned_slab_is_known_by_its_addresses(device: CudaDevice) -> None:
    slab, other = part(100)
    link = CudaLink(GPU)
    link.add_pinned(slab[10:20])
    for begin, end, is_inside in [(10, 20, True), (12, 15, True), (9, 12, False), (19, 21, False), (0, 5, False)]:
        assert link.reads([(slab[begin:end], other)]) == is_inside
    assert not link.reads([(slab[10:20], other), (other, other)])
    link.remove_pinned()
    assert not link.reads([(slab[10:20], other)])


def test_a_refused_pin_is_a_reason_and_clears_the_error(device: CudaDevice, recorder: Recorder) -> None:
    recorder.refusal = "out of memory"
    assert device.pin(part()[0]) == "out of memory"
    assert recorder.take() == ["register 8", "compute"]
    device.close()
    assert "unregister" not in recorder.take()
    assert device.pin(torch.zeros(0, dtype=torch.uint8)) == "it is empty"


def test_pinned_memory_is_given_back_after_the_copies(device: CudaDevice, recorder: Recorder) -> None:
    assert device.pin(part()[0]) is None
    recorder.take()
    device.close()
    calls = recorder.take()
    assert calls[-1] == "unregister" and calls.count("unregister") == 1
    assert {"synchronize side", "synchronize urgent"} <= set(calls[:-1])
    device.close()
    assert "unregister" not in recorder.take()


def test_memory_is_the_drivers_and_what_torch_does_not_use(device: CudaDevice) -> None:
    assert (device.free_bytes(), device.total_bytes()) == (1020, 4000)


def test_a_pool_waits_for_what_may_use_its_memory(
    device: CudaDevice, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda num, *, dtype, device: recorder.call(str(device)) and empty(num))
    assert device.make_pool(3, 100).num_slots == 3
    assert recorder.take() == ["cuda:0", "synchronize all"]


@pytest.mark.parametrize("pinned", [True, False])
def test_a_lost_device_is_told_by_the_wait(device: CudaDevice, recorder: Recorder, pinned: bool) -> None:
    src, dst = part()
    if pinned:
        device.pin(src)
    arrived = device.copier.copy([(src, dst)])
    arrived.wait()
    recorder.lost = True
    for ticket in (arrived, device.copier.copy([(src, dst)])):
        for _ in range(2):
            with pytest.raises(DeviceError) as caught:
                ticket.wait()
            assert "cuda:0 failed while copying (CUDA error: unspecified launch failure); " in one_line(caught)
        assert ticket.done()
    with pytest.raises(DeviceError, match="while computing"):
        device.copier.mark()
    with pytest.raises(DeviceError, match="while being asked for its free memory"):
        device.free_bytes()
    device.copier.restart()
