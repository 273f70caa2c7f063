"""A device by its name."""

from __future__ import annotations

import re

from offmoe.core.errors import UsageError
from offmoe.tiers.cuda import CudaDevice, why_no_cuda
from offmoe.tiers.device import Device


def open_device(name: str) -> Device | None:
    """The device called "cuda" (the first), "cuda:N", or "auto" (the first, if there is one); None is the CPU.

    Raises DeviceError where there is no such device or it does not work, UsageError for another name.
    """
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", name)
    if match is None and name not in {"auto", "cpu"}:
        raise UsageError(f"device is {name!r}; known: auto, cpu, cuda, cuda:0, cuda:1, ...")
    if name == "cpu":
        return None
    if match is None and why_no_cuda() is not None:
        return None
    return CudaDevice(int(match.group(1) or 0) if match is not None else 0)
