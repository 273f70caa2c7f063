"""Small tensors made on the host, for a device."""

from __future__ import annotations

import torch

# Pinned memory for more than this costs more than it saves.
MAX_PINNED_BYTES = 1 << 20


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, without a wait: a plain `.to("cuda")`, or `torch.tensor(..., device="cuda")`, would make
    the host wait for everything queued. The pinned copy goes back to torch's allocator when it was read; a larger
    tensor is staged by the driver before this returns.
    """
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    return (tensor.pin_memory() if tensor.nbytes <= MAX_PINNED_BYTES else tensor).to(device, non_blocking=True)
