"""What the machine can do, measured alone, in a few seconds: the ceilings that a benchmark's results are held against.

Each figure is the best of several timings, since a ceiling is asked for. Device work is timed with events.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from benchlib.roofline import Bandwidths
from offmoe.probe.speeds import host_read

REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is moved or multiplied; the small ones are for trying the script itself."""

    device_bytes: int = 2 << 30
    link_bytes: int = 256 << 20
    host_bytes: int = 2 << 30
    expert_width: int = 2048
    expert_bytes: int = 9 << 20
    matrix: int = 8192


TINY = Sizes(
    device_bytes=1 << 20, link_bytes=1 << 20, host_bytes=1 << 20, expert_width=64, expert_bytes=1 << 14, matrix=64
)


def measure(device: torch.device, sizes: Sizes) -> Bandwidths:
    """All of `Bandwidths`. On the CPU as "device" the copies are copies in host memory."""
    return Bandwidths(
        device_bytes_per_s=_copy(device, sizes.device_bytes),
        link_bytes_per_s=_link(device, sizes.link_bytes),
        cpu_bytes_per_s=_cpu_experts(sizes),
        host_bytes_per_s=host_read(sizes.host_bytes),
        device_flops=_matrix(device, sizes.matrix),
        layer_s=_round_trip(device),
    )


def _best(device: torch.device, work: Callable[[], object]) -> float:
    """The shortest seconds of `REPEATS` runs, after one that does not count."""
    work()
    return min(_timed(device, work) for _ in range(REPEATS))


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    event: Any = torch.cuda.Event  # untyped in torch
    begun, ended = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize(device)
    begun.record()
    work()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3


def _copy(device: torch.device, num_bytes: int) -> float:
    """Device memory: bytes read plus bytes written by a copy within it."""
    src = torch.ones(num_bytes // 2, dtype=torch.uint8, device=device)
    dst = torch.empty_like(src)
    return 2 * src.nbytes / _best(device, lambda: dst.copy_(src))


def _link(device: torch.device, num_bytes: int) -> float:
    """Host to device from page-locked memory."""
    src = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    dst = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return num_bytes / _best(device, lambda: dst.copy_(src, non_blocking=True))


def _cpu_experts(sizes: Sizes) -> float:
    """Weights read by bfloat16 matrix-vector products, over more experts than processor caches hold."""
    width = sizes.expert_width
    rows = sizes.expert_bytes // 2 // width
    experts = (
        torch.randn(rows, width).to(torch.bfloat16).repeat(max(2, sizes.host_bytes // sizes.expert_bytes // 2), 1, 1)
    )
    x_TD = torch.randn(1, width).to(torch.bfloat16)

    def read_all() -> None:
        for expert in experts:
            functional.linear(x_TD, expert)

    with torch.inference_mode():
        return experts.nbytes / _best(torch.device("cpu"), read_all)


def _matrix(device: torch.device, width: int) -> float:
    """bfloat16 matrix product of random square matrices, operations a second."""
    left, right = (torch.randn(width, width, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * width**3 / _best(device, lambda: left @ right)


def _round_trip(device: torch.device) -> float:
    """Asking the device for a few numbers and waiting: what a layer with a missed expert costs whatever it moves."""
    numbers = torch.ones(8, dtype=torch.int64, device=device)
    rounds = 50
    begin = time.perf_counter()
    for _ in range(rounds):
        numbers.add_(1).tolist()
    return (time.perf_counter() - begin) / rounds
