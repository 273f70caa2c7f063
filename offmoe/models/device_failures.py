"""What torch raises when a device is full or lost, said in offmoe's errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from offmoe.base.errors import BudgetError, OffmoeError
from offmoe.base.units import format_bytes
from offmoe.tiers.cuda import as_device_error

if TYPE_CHECKING:
    from offmoe.tiers.device import Device

# How errors of the driver, of cuBLAS and of Triton begin where they are plain RuntimeErrors.
_LOST = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "cuDNN error")


def explain(error: BaseException, device: Device | None) -> OffmoeError | None:
    """The error for the user; None for one that is not the device's."""
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
    """Within: failures of `device` are raised as OffmoeErrors."""
    try:
        yield
    except RuntimeError as error:
        if (better := explain(error, device)) is None:
            raise
        raise better from error


def release_unused(device: Device | None) -> None:
    """Give what torch's allocator keeps for later back to the device, where others, and larger blocks, can use it."""
    if device is not None and device.torch_device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(device: Device) -> int | None:
    """The most that torch had allocated on `device` at once so far; None where that is not counted."""
    if device.torch_device.type != "cuda":
        return None
    return int(torch.cuda.max_memory_allocated(device.torch_device))


def _free(device: Device) -> str:
    with contextlib.suppress(RuntimeError, OffmoeError):
        return f", {format_bytes(device.free_bytes())} are free"
    return ""
