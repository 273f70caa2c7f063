"""The threads of the CPU kernels: several callers, children of a fork, sleep, and the end."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from offmoe.kernels import cpu
from offmoe.kernels.cpu import CpuKernels, describe

pytestmark = pytest.mark.skipif(not cpu.usable_levels(), reason="the library was not built")

FORK = """
import os
import torch
from offmoe.kernels.cpu import describe, load_cpu_kernels

torch.set_num_threads(1)
kernels, _ = load_cpu_kernels(threads=2)
weight, x = torch.randn(999, 64), torch.randn(2, 64)
matrix = describe(weight)
before = kernels.linear(x, matrix)
child = os.fork()
if child == 0:
    same = torch.equal(kernels.linear(x, matrix), before)
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0, "the child computed something else"
assert torch.equal(kernels.linear(x, matrix), before)
"""


def open_kernels(threads: int) -> CpuKernels:
    kernels, note = cpu.load_cpu_kernels(threads=threads)
    assert kernels is not None, note
    return kernels


def test_callers_on_several_threads_get_their_own_results() -> None:
    kernels = open_kernels(2)
    weight = torch.randn(777, 100)
    matrix, xs = describe(weight), [torch.randn(3, 100) for _ in range(8)]
    expected = [kernels.linear(x, matrix) for x in xs]

    def compute(idx: int) -> bool:
        return all(torch.equal(kernels.linear(xs[idx], matrix), expected[idx]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compute, range(len(xs))))
    kernels.close()


def test_helpers_that_sleep_are_woken() -> None:
    kernels = open_kernels(2)
    weight, x_TK = torch.randn(5000, 64), torch.randn(1, 64)
    matrix = describe(weight)
    for _ in range(5):
        time.sleep(0.005)  # longer than a helper looks for work
        torch.testing.assert_close(kernels.linear(x_TK, matrix), x_TK @ weight.t(), rtol=1e-4, atol=1e-4)
    kernels.close()


def test_a_forked_child_computes_too() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_many_are_opened_and_closed() -> None:
    weight, x_TK = torch.randn(40, 64), torch.randn(1, 64)
    for threads in (1, 2) * 10:
        kernels = open_kernels(threads)
        kernels.linear(x_TK, describe(weight))
        kernels.close()
        kernels.close()
