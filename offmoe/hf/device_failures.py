"""Translation of torch's errors about full memory and full or lost devices into offmoe's errors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from offmoe.core.errors import BudgetError, OffmoeError, ResourceError
from offmoe.core.units import format_bytes
from offmoe.machine.memory import available_ram_bytes
from offmoe.tiers.cuda_events import as_device_error

if TYPE_CHECKING:
    from offmoe.tiers.device import Device

# How torch says that there is no RAM: a RuntimeError with the number of bytes.
_NO_RAM = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)(?:.*?you tried to allocate (\d+))?", re.DOTALL
)
_NO_THREAD = "can't start new thread"
# How errors of the driver, of cuBLAS and of Triton begin where they are plain RuntimeErrors.
_LOST = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "cuDNN error")


def explain(error: BaseException, device: Device | None) -> OffmoeError | None:
    """The error for the user; None for one that is not of memory, threads or the device."""
    no_ram = _NO_RAM.search(str(error)) if isinstance(error, RuntimeError) else None
    if isinstance(error, MemoryError) or no_ram is not None:
        return _out_of_ram(error, no_ram)
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        return ResourceError(
            "the system refuses a thread; end other programs, or raise the limit (ulimit -u, or a container's pids.max)"
        )
    if device is None:
        return None
    if isinstance(error, torch.OutOfMemoryError):
        return BudgetError(
            f"{device.name} is out of memory{_free(device)}; close other programs that use it, or load with a lower "
            "--vram, --context-length or --prefill-chunk"
        )
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and str(error).startswith(_LOST)):
        return as_device_error(error, device.torch_device, "computing")
    return None


@contextlib.contextmanager
def explained(device: Device | None) -> Iterator[None]:
    """Raise failures of `device`, and RAM and threads that the system refuses, as OffmoeErrors."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (better := explain(error, device)) is None:
            raise
        raise better from error


def _out_of_ram(error: BaseException, no_ram: re.Match[str] | None) -> BudgetError:
    if no_ram is not None and no_ram.group(1):
        what = f"the system refused {format_bytes(int(no_ram.group(1)))}"
    else:
        what = " ".join(str(error).split())[:100] or "the system refused more"
    return BudgetError(
        f"memory ran out: {what}; {format_bytes(available_ram_bytes())} are free: close other programs, or use a lower "
        "--ram, --context-length or --prefill-chunk"
    )


def release_unused(device: Device | None) -> None:
    """Give what torch's allocator keeps for later back to the device, where others, and larger blocks, can use it."""
    if device is not None and device.torch_device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(device: Device) -> int | None:
    """The most that this process held of `device` so far: by torch's allocator, also where it is not in use at the
    moment, and by the driver as of now. None where that is not counted.
    """
    if device.torch_device.type != "cuda":
        return None
    return int(torch.cuda.max_memory_reserved(device.torch_device)) + device.driver_bytes()


def _free(device: Device) -> str:
    with contextlib.suppress(RuntimeError, OffmoeError):
        return f", {format_bytes(device.free_bytes())} are free"
    return ""
