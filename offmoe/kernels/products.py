"""Products of many rows with a matrix on the CPU.

On a processor without instructions for bfloat16 (AVX2) torch multiplies such matrices at a sixth of float32's speed: 15
to 20 GFLOP/s on two threads, whatever the number of rows. There our kernels take every product that they have tiles for
(`most_rows`). Of the others a block of weights at a time is turned into float32 and multiplied so: 30 to 116 GFLOP/s
from 16 to 512 rows (benchmarks/2026-11-30-prompts-avx2.md). Sums are float32 either way, and rounded once.

Shapes: N rows, K inputs, M outputs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import cache

import torch
from torch.nn.functional import linear

# Weights that are float32 at a time: 4 MiB, which a processor's caches hold.
BLOCK_NUMBERS = 1 << 20
# Rows that are float32 at a time: what is made of them stays small beside the rows of a long prompt.
BLOCK_ROWS = 256
# With fewer, turning the weights is most of the work.
LEAST_ROWS = 16
_TRIED_ROWS, _TRIED_WIDTH, _TRIES = 64, 1024, 3
# Three times faster with AVX2, and slower with bfloat16's own instructions: a machine decides alike in every process.
_CLEARLY = 1.5
# Whether oneDNN has kernels for a type on this processor.
_HAS_KERNELS: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
}


def multiply(x: torch.Tensor, weight_MK: torch.Tensor, bias_M: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply like torch's `linear`, (..., K) to (..., M), in the way that is faster here. Without gradients."""
    width = weight_MK.shape[1]
    if x.dtype != weight_MK.dtype or x.device.type != "cpu" or x.numel() < LEAST_ROWS * width:
        return linear(x, weight_MK, bias_M)
    if not float32_is_faster(x.dtype):
        return linear(x, weight_MK, bias_M)
    return _in_blocks(x.reshape(-1, width), weight_MK, bias_M).view(*x.shape[:-1], len(weight_MK))


def most_rows(dtype: torch.dtype, *, in_tiles: bool) -> int:
    """Rows of one matrix up to which the CPU kernels, which read the weights once for all, are faster than `multiply`.

    `in_tiles`: they have tiles for the matrix, which are as fast as torch's float32 for any number of rows.
    Bfloat16 with AVX-512, one thread: 16 rows 16.6 ms against 17.0, 32 rows 27.5 against 20.7. With AVX2, two threads
    and 8,192 by 2,048: 32 rows 17.4 ms against 27.5, 64 rows 35.8 against 33.1.
    """
    if not float32_is_faster(dtype):
        return 16
    return sys.maxsize if in_tiles else 48


@cache
def float32_is_faster(dtype: torch.dtype) -> bool:
    """Whether products of this type are clearly faster in float32 here.

    They are where oneDNN, which multiplies for torch, has no kernels for the type. Elsewhere it is measured once, in a
    tenth of a second: a busy neighbour can turn that round (with AVX2 in five starts of nine), so what is known is not
    measured.
    """
    if dtype not in _HAS_KERNELS:
        return False
    if torch.backends.mkldnn.is_available() and not _HAS_KERNELS[dtype]():
        return True
    x_NK = torch.ones(_TRIED_ROWS, _TRIED_WIDTH, dtype=dtype)
    weight_MK = torch.ones(_TRIED_WIDTH, _TRIED_WIDTH, dtype=dtype)
    times = {"own": list[float](), "float32": list[float]()}
    for _ in range(_TRIES):
        for way, seconds in times.items():
            began = time.perf_counter()
            if way == "own":
                linear(x_NK, weight_MK)
            else:
                _in_blocks(x_NK, weight_MK, None)
            seconds.append(time.perf_counter() - began)
    return _CLEARLY * min(times["float32"]) < min(times["own"])


def _in_blocks(x_NK: torch.Tensor, weight_MK: torch.Tensor, bias_M: torch.Tensor | None) -> torch.Tensor:
    num_outputs = len(weight_MK)
    y_NM = torch.empty(len(x_NK), num_outputs, dtype=x_NK.dtype)
    step = max(1, min(num_outputs, BLOCK_NUMBERS // weight_MK.shape[1]))
    bias = None if bias_M is None else bias_M.float()
    for row in range(0, len(x_NK), BLOCK_ROWS):
        x = x_NK[row : row + BLOCK_ROWS].float()
        for begin in range(0, num_outputs, step):
            outputs = slice(begin, begin + step)
            y = linear(x, weight_MK[outputs].float(), None if bias is None else bias[outputs])
            y_NM[row : row + BLOCK_ROWS, outputs] = y
    return y_NM
