"""Free memory of NVIDIA devices by the management library's word: asking makes no CUDA context, which takes memory.

The C interface is NVIDIA's "NVML API Reference": nvmlInit, nvmlDeviceGetHandleByIndex, nvmlDeviceGetUUID,
nvmlDeviceGetMemoryInfo. The library comes with the driver.
"""

from __future__ import annotations

import ctypes

_LIBRARY = "libnvidia-ml.so.1"
_UUID_BYTES = 96


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def free_by_uuid() -> dict[str, int]:
    """Free bytes of each device, by its UUID without "GPU-"; empty where the library does not tell."""
    try:
        nvml = ctypes.CDLL(_LIBRARY)
    except OSError:
        return {}
    if nvml.nvmlInit_v2():
        return {}
    found, count = {}, ctypes.c_uint()
    try:
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return {}
        for idx in range(count.value):
            handle, uuid, memory = ctypes.c_void_p(), ctypes.create_string_buffer(_UUID_BYTES), _Memory()
            failed = (
                nvml.nvmlDeviceGetHandleByIndex_v2(idx, ctypes.byref(handle))
                or nvml.nvmlDeviceGetUUID(handle, uuid, _UUID_BYTES)
                or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
            )
            if not failed:
                found[uuid.value.decode("ascii", "replace").removeprefix("GPU-")] = int(memory.free)
    finally:
        nvml.nvmlShutdown()
    return found
