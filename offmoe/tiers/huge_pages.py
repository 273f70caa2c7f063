"""Tensors in huge pages, and pages that are there before somebody waits for them.

A matrix of 4 KB rows in 4 KB pages costs a look-up of an address every row: the CPU kernels read bfloat16 at 22 to 24
GB/s from such pages and at 31 from huge ones, where a plain read makes 32 and 35 (two cores).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from offmoe.machine.memory import num_cores

HUGE_BYTES = 2 << 20
# Smaller tensors stay where they are.
_LEAST_BYTES = 4 << 20
# Linux 5.14; the mmap module of Python has no name for it.
_MADV_POPULATE_WRITE = 23
_FAULTED_BYTES = 64 << 20


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a large tensor in RAM in huge pages, where the system has them.

    `tensor` itself where it is small, on a device, not contiguous, or no memory can be mapped. What does not fill a
    huge page is in small ones, so the copy takes no more memory than the original.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < _LEAST_BYTES or not tensor.is_contiguous():
        return tensor
    memory = huge_memory(tensor.nbytes)
    return tensor if memory is None else memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def huge_memory(num_bytes: int) -> torch.Tensor | None:
    """Fresh memory (U8, zeros) in huge pages, where the system has them; None where no memory can be mapped so."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        mapping = mmap.mmap(-1, num_bytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    begin = -memory.data_ptr() % HUGE_BYTES
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE, begin, num_bytes // HUGE_BYTES * HUGE_BYTES)
    return memory[begin : begin + num_bytes]


def forget(address: int, num_bytes: int) -> None:
    """Give memory back whose numbers nobody reads any more, before the tensor that has it goes: whole pages of it."""
    begin = address + -address % mmap.PAGESIZE
    end = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def fault_in(slab: torch.Tensor, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Take the memory of a fresh mapping now, page by page, on all cores. Where the system cannot, nothing is done.

    `progress(done_bytes, total_bytes)` is called after each piece. A driver that page-locks memory without pages takes
    them on one thread: 1 to 2 GB/s by others' measurements.
    """
    if sys.platform != "linux" or slab.data_ptr() % mmap.PAGESIZE:
        return
    populate = partial(_populate, ctypes.CDLL(None).madvise, slab.data_ptr(), slab.nbytes)
    with contextlib.suppress(RuntimeError), ThreadPoolExecutor(num_cores()) as threads:  # it may get no thread
        begins = range(0, slab.nbytes, _FAULTED_BYTES)
        for begin, _ in zip(begins, threads.map(populate, begins), strict=True):
            progress(min(begin + _FAULTED_BYTES, slab.nbytes), slab.nbytes)


def _populate(madvise: ctypes._NamedFuncPointer, address: int, num_bytes: int, begin: int) -> None:
    length = ctypes.c_size_t(min(_FAULTED_BYTES, num_bytes - begin))
    madvise(ctypes.c_void_p(address + begin), length, _MADV_POPULATE_WRITE)
