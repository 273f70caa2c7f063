"""Products of many bfloat16 rows: the CPU kernels, torch's own, and float32 in blocks (offmoe/kernels/products.py).

    scripts/bench products            # torch's threads as OMP_NUM_THREADS says

The best of five calls each, on random matrices. A table goes to stdout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence

import torch

from benchlib.command_line import make_parser
from offmoe.kernels.cpu.decode import CpuLinear
from offmoe.kernels.cpu.loader import load_cpu_kernels
from offmoe.kernels.products import _in_blocks

SIZES = ((8192, 2048), (2048, 4096), (1536, 2048))
ROWS = (8, 16, 32, 64, 128, 256, 512)


def main(argv: Sequence[str]) -> int:
    """Print the table, then the same as JSON: kernels, torch, float32 blocks."""
    make_parser(__doc__).parse_args(argv)
    kernels, reason = load_cpu_kernels()
    if kernels is None:
        print(f"error: no CPU kernels ({reason})", file=sys.stderr)
        return 2
    print(f"{kernels}; torch {torch.__version__}, {torch.get_num_threads()} threads; GFLOP/s\n")
    print("| outputs x inputs | rows | kernels | torch | float32 blocks |\n|---|---|---|---|---|")
    found = []
    for num_out, num_in in SIZES:
        weight = (torch.randn(num_out, num_in) / 50).to(torch.bfloat16)
        linear = CpuLinear(kernels, weight, None, dtype=torch.bfloat16)
        for num_rows in ROWS:
            x = torch.randn(num_rows, num_in).to(torch.bfloat16)
            work = 2 * num_out * num_in * num_rows / 1e9

            def with_torch(x: torch.Tensor = x, weight: torch.Tensor = weight) -> torch.Tensor:
                return torch.nn.functional.linear(x, weight)

            def with_kernels(x: torch.Tensor = x, linear: CpuLinear = linear) -> torch.Tensor:
                return linear(x)

            def in_blocks(x: torch.Tensor = x, weight: torch.Tensor = weight) -> torch.Tensor:
                return _in_blocks(x, weight, None)

            ways = (with_kernels, with_torch, in_blocks)
            speeds = [work / best(way) for way in ways]
            print(f"| {num_out} x {num_in} | {num_rows} |", *(f"{speed:.0f} |" for speed in speeds), flush=True)
            found.append({"outputs": num_out, "inputs": num_in, "rows": num_rows, "gflops": speeds})
    print(json.dumps(found))
    return 0


def best(way: Callable[[], torch.Tensor]) -> float:
    """Seconds."""
    way()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        way()
        times.append(time.perf_counter() - began)
    return min(times)
