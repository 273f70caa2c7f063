"""A CUDA device and the link to it. Everything of the tiers that touches CUDA is here.

Streams. Copies run on two side streams of the device, the urgent one of high priority; the model computes on the
current stream of the thread that runs it. What orders them:
- a copy begins behind its `after` event, which that thread recorded when it had submitted the last computation that
  reads the destination;
- a computation reads a slot behind the copy's event, for which `wait()` makes the thread's current stream wait;
- a computation on another stream than the one before (a caller's own `torch.cuda.stream`) begins behind what was
  queued on that one (`follow_stream`);
- a chunk of the staging ring is written again, by the worker, after its event (tiers/ring.py).
The slab and the ring live as long as the device's copier, so torch's allocator need not be told of the side streams
(`record_stream`); `make_pool` waits for the device once, since the allocator may hand out memory that queued kernels
still use. Not promised: that a copy ends before one that was queued later on the other stream; that any of it may run
while a CUDA graph is being captured.

A failed CUDA call is final for the process (torch cannot reset a device): it is told as a DeviceError, here or by
whoever computes (`as_device_error`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence

import torch

from offmoe.core.errors import DeviceError
from offmoe.memory.budget import CUDA_CONTEXT_BYTES
from offmoe.tiers.copier import Copier, CopyPart
from offmoe.tiers.cuda_events import CudaArrival, CudaMark, CudaMoment, EventPool, as_device_error, one_sentence
from offmoe.tiers.device import DevicePool
from offmoe.tiers.driver_memory import free_by_uuid
from offmoe.tiers.huge_pages import fault_in
from offmoe.tiers.ring import CHUNK_BYTES, RING_CHUNKS, RingCopier


def why_no_cuda() -> str | None:
    """The reason why no CUDA device can be used at all, None where there is one."""
    if not torch.backends.cuda.is_built():
        return f"this torch ({torch.__version__}) was built without CUDA; install one with it (https://pytorch.org)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error says the same
        if torch.cuda.is_available():
            return None
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return f"CUDA does not work here ({one_sentence(error)}); install or update the NVIDIA driver"
    return "CUDA finds no device; look whether nvidia-smi lists one and CUDA_VISIBLE_DEVICES does not hide it"


class CudaLink:
    """The two side streams of `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.events = device, EventPool(device)
        self._streams = {False: torch.cuda.Stream(device), True: torch.cuda.Stream(device, priority=-1)}
        self._pinned: list[tuple[int, int]] = []

    def reads(self, parts: Sequence[CopyPart]) -> bool:
        """True for slabs told to `add_pinned`."""
        return all(
            any(begin <= src.data_ptr() and src.data_ptr() + src.nbytes <= end for begin, end in self._pinned)
            for src, _ in parts
        )

    def add_pinned(self, slab: torch.Tensor) -> None:
        """`slab` is page-locked."""
        self._pinned = [*self._pinned, (slab.data_ptr(), slab.data_ptr() + slab.nbytes)]

    def remove_pinned(self) -> None:
        """Nothing is page-locked any more."""
        self._pinned = []

    def begin(self, parts: Sequence[CopyPart], *, urgent: bool, after: object | None) -> CudaArrival:
        """Queue on a side stream. Returns before the bytes were read, unless a source is pageable."""
        stream = self._streams[urgent]
        try:
            # The worker is a thread of its own: its current device and stream are those of a new thread. Inference
            # mode is also per thread, and with it the writing costs no autograd bookkeeping.
            with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(stream):
                if isinstance(after, CudaMark):
                    stream.wait_event(after.event)
                for src, dst in parts:
                    dst.copy_(src, non_blocking=True)
                return CudaArrival(self.events, stream)
        except RuntimeError as error:
            self.synchronize()
            raise as_device_error(error, self._device, "copying") from error
        except DeviceError:
            self.synchronize()
            raise

    def mark(self) -> CudaMark:
        """An event on the calling thread's current stream. Raises DeviceError."""
        return CudaMark(self.events)

    def synchronize(self) -> None:
        """Wait for both streams; a lost device has nothing to wait for."""
        for stream in self._streams.values():
            try:
                stream.synchronize()
            except RuntimeError:
                return


class CudaDevice:
    """Device number `index`."""

    def __init__(self, index: int, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Raises DeviceError where it cannot be used."""
        reason = why_no_cuda()
        if reason is not None:
            raise DeviceError(f"{reason}, or use --device cpu")
        if index >= torch.cuda.device_count():
            known = ", ".join(
                f"cuda:{idx} {torch.cuda.get_device_name(idx)}" for idx in range(torch.cuda.device_count())
            )
            raise DeviceError(f"there is no cuda:{index} here; known: {known}")
        self.torch_device = torch.device("cuda", index)
        # Not known where this process has a context already.
        self._free_before = {} if torch.cuda.is_initialized() else free_by_uuid()
        try:
            torch.ones(1, device=self.torch_device).add_(1).cpu()  # a GPU too old for this torch fails here
            self.name = torch.cuda.get_device_name(index)
            self._link = CudaLink(self.torch_device)
        except RuntimeError as error:
            raise DeviceError(
                f"cuda:{index} cannot be used ({one_sentence(error)}); end other programs that use it, install a "
                "torch that knows it, or use --device cpu"
            ) from error
        self._slabs: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        with torch.cuda.device(self.torch_device):
            ring = _make_ring(chunk_bytes)
        self.copier: Copier = RingCopier(self._link, ring, chunk_bytes=chunk_bytes)

    def __repr__(self) -> str:
        return f"<CudaDevice {self.torch_device} [{self.name} | {len(self._slabs)} slabs pinned]>"

    def make_pool(self, num_slots: int, slot_bytes: int, *, min_slots: int | None = None) -> DevicePool:
        """See Device. Waits for the device: side streams may then write to the slab at once."""
        torch.cuda.empty_cache()
        pool = DevicePool(self.torch_device, num_slots=num_slots, slot_bytes=slot_bytes, min_slots=min_slots)
        torch.cuda.synchronize(self.torch_device)
        return pool

    def pin(self, slab: torch.Tensor, progress: Callable[[int, int], None] = lambda done, total: None) -> str | None:
        """See Device. All of the slab is page-locked, so all of it counts as used from now on."""
        fault_in(slab, progress)
        with torch.cuda.device(self.torch_device):
            reason = try_pin(slab)
        if reason is None:
            self._slabs.append(slab)  # its memory must not be unmapped before it is unregistered
            self._link.add_pinned(slab)
        return reason

    def unpin(self) -> None:
        """See Device."""
        self._link.synchronize()
        self._link.remove_pinned()
        while self._slabs:
            torch.cuda.cudart().cudaHostUnregister(self._slabs.pop().data_ptr())

    def follow_stream(self) -> None:
        """Compare two streams, and no more unless a caller has changed them; see Device."""
        current = torch.cuda.current_stream(self.torch_device)
        if self._stream is not None and current != self._stream:
            current.wait_stream(self._stream)
        self._stream = current

    def moment(self) -> CudaMoment:
        """A timed event. Two of them a wait cost the host some microseconds, a copy takes a hundred or more."""
        return CudaMoment(self._link.events)

    def free_bytes(self) -> int:
        """By the driver's word, and what torch has cached and does not use. Raises DeviceError."""
        try:
            cached = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
            return torch.cuda.mem_get_info(self.torch_device)[0] + cached
        except RuntimeError as error:
            raise as_device_error(error, self.torch_device, "being asked for its free memory") from error

    def driver_bytes(self) -> int:
        """Return the free memory before this process had a context, less that of now and what torch's allocator
        holds; graphs' pools and cuBLAS work spaces are in the latter. What others take or give back meanwhile is in it.
        CUDA_CONTEXT_BYTES where it cannot be measured.
        """
        before, now = self._free_before, free_by_uuid() if self._free_before else {}
        uuid = str(torch.cuda.get_device_properties(self.torch_device).uuid) if before else ""
        if uuid not in before or uuid not in now:
            return CUDA_CONTEXT_BYTES
        measured = before[uuid] - now[uuid] - torch.cuda.memory_reserved(self.torch_device)
        return measured if measured > 0 else CUDA_CONTEXT_BYTES

    def total_bytes(self) -> int:
        """Bytes of the whole device, whoever uses it."""
        return torch.cuda.get_device_properties(self.torch_device).total_memory

    def close(self) -> None:
        """End the copies, then give pinned memory back."""
        self.copier.close()
        self.unpin()


def try_pin(slab: torch.Tensor) -> str | None:
    """Page-lock `slab` where it lies, for the current device; the reason where it is refused (WSL, little RAM).

    Undone with cudaHostUnregister, before the memory is unmapped.
    """
    if not slab.nbytes:
        return "it is empty"
    try:
        runtime = torch.cuda.cudart()
        result = runtime.cudaHostRegister(slab.data_ptr(), slab.nbytes, 0)
        if result == runtime.cudaError.success:
            return None
        reason = str(runtime.cudaGetErrorString(result))
    except (RuntimeError, AssertionError) as error:
        return one_sentence(error)
    # The runtime keeps the refusal as its last error; torch would find it after the next kernel launch and blame that
    # one. So the next ones are here.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda").add_(1)
    return reason


def _make_ring(chunk_bytes: int) -> torch.Tensor | None:
    """Pinned chunks to stage in, None where the system refuses them."""
    try:
        return torch.empty(RING_CHUNKS * chunk_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return None
