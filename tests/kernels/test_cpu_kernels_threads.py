"""The threads of the CPU kernels: several callers, children of a fork, sleep, and the end."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from cpu_cases import linear, needs_library, open_kernels
from patience import PATIENCE_S

pytestmark = needs_library

FORK = """
import os
import torch
from offmoe.kernels.cpu import load_cpu_kernels
from offmoe.kernels.cpu.decode import CpuLinear

torch.set_num_threads(1)
kernels, _ = load_cpu_kernels(threads=2)
weight, x = torch.randn(999, 64), torch.randn(2, 64)
linear = CpuLinear(kernels, weight, None, dtype=x.dtype)
before = linear(x)
child = os.fork()
if child == 0:
    same = torch.equal(linear(x), before)
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0, "the child computed something else"
assert torch.equal(linear(x), before)
"""


def test_callers_on_several_threads_get_their_own_results() -> None:
    kernels = open_kernels()
    weight = torch.randn(777, 100)
    xs = [torch.randn(3, 100) for _ in range(8)]
    expected = [linear(kernels, x, weight) for x in xs]

    def compute(idx: int) -> bool:
        return all(torch.equal(linear(kernels, xs[idx], weight), expected[idx]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compute, range(len(xs))))
    kernels.close()


def test_helpers_that_sleep_are_woken() -> None:
    kernels = open_kernels()
    weight, x_TK = torch.randn(5000, 64), torch.randn(1, 64)
    for _ in range(5):
        time.sleep(0.005)  # longer than a helper looks for work
        torch.testing.assert_close(linear(kernels, x_TK, weight), x_TK @ weight.t(), rtol=1e-4, atol=1e-4)
    kernels.close()


def test_a_forked_child_computes_too() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr


def test_many_are_opened_and_closed() -> None:
    weight, x_TK = torch.randn(40, 64), torch.randn(1, 64)
    for threads in (1, 2) * 10:
        kernels = open_kernels(threads=threads)
        linear(kernels, x_TK, weight)
        kernels.close()
        kernels.close()
