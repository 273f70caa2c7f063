"""Costs of this machine, measured at load on the model's own experts: disk, link, CPU, and link beside CPU."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial

import torch

from offmoe.cache.host_store import HostStore
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.core.keys import ExpertKey
from offmoe.kernels.reference import ExpertMath
from offmoe.machine.costs import Costs
from offmoe.moe.cpu_experts import CpuExperts
from offmoe.moe.dispatch import Assignment
from offmoe.placement.calibrate import measure
from offmoe.tiers.copier import Copier

# Experts that are copied and computed in turn: more than a CPU's caches hold, and little to read.
NUM_EXPERTS = 6
# Rows of the product that shows the CPU's arithmetic, and repeats of it.
NUM_ROWS, NUM_REPEATS = 64, 3


def measure_miss_costs(
    experts: ExpertIndex, maths: Sequence[ExpertMath], link: HostStore, copier: Copier, cpu: CpuExperts, *,
    num_device_slots: int, width_D: int,
) -> Costs:  # fmt: skip
    """Read a few experts into RAM, where they stay, and copy them to device slots, which must be free."""
    host, layer_idx = link.host, 0
    num = min(NUM_EXPERTS, host.num_slots, num_device_slots, experts.layers[layer_idx].num_experts)
    keys = [ExpertKey(layer_idx, idx) for idx in range(num)]
    begin = time.perf_counter()
    fetches = [fetch for key in keys if (fetch := host.start(key, cold=True)) is not None]
    weights = [host.finish(fetch) for fetch in fetches]
    keys = [fetch.key for fetch in fetches]
    disk_s = time.perf_counter() - begin
    counted = dataclasses.replace(host.counters)
    try:
        serve_one = partial(_serve, cpu, layer_idx, maths[layer_idx], torch.randn(1, width_D))
        serve_rows = partial(_serve, cpu, layer_idx, maths[layer_idx], torch.randn(NUM_ROWS, width_D))
        num_weights = weights[0].num_weights
        with torch.inference_mode():
            serve_rows(keys[0])
            begin = time.perf_counter()
            for _ in range(NUM_REPEATS):
                serve_rows(keys[0])
            rows_s = (time.perf_counter() - begin) / NUM_REPEATS
            return measure(
                copier, [link.parts(key, slot) for slot, key in enumerate(keys)], lambda idx: serve_one(keys[idx]),
                disk_bytes_per_s=sum(host.num_bytes(key) for key in keys) / max(disk_s, 1e-9),
                cpu_flops_per_s=2 * num_weights * NUM_ROWS / max(rows_s, 1e-9), synchronize=link.synchronize,
            )  # fmt: skip
    finally:
        host.counters.hits = counted.hits  # look-ups of this measurement are no tokens'
        host.release(keys)


def _serve(cpu: CpuExperts, layer_idx: int, math: ExpertMath, x_TD: torch.Tensor, key: ExpertKey) -> None:
    """Compute an expert for all rows as a miss in RAM is: on its thread, by the kernels that serve it."""
    x_TD = x_TD.to(math.dtype)
    if len(x_TD) == 1:
        rows = Assignment(key.expert_idx, 1, 0, None)
    else:
        every_N = torch.arange(len(x_TD))
        rows = Assignment(key.expert_idx, len(x_TD), every_N, every_N, every_N)
    y_SD = torch.empty_like(x_TD)
    job = cpu.start(layer_idx, math, {key: [rows]}, x_TD)
    try:
        job.collect(y_SD)
    finally:
        job.close()
