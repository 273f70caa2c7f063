"""Indices made on the host, for a device."""

from __future__ import annotations

import torch


def upload(indices: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`indices` on `device`, without a wait: a plain `.to("cuda")`, or `torch.tensor(..., device="cuda")`, would make
    the host wait for everything queued. The pinned copy goes back to torch's allocator when it was read.
    """
    if device.type != "cuda" or indices.device == device:
        return indices.to(device)
    return indices.pin_memory().to(device, non_blocking=True)
