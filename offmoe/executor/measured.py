"""Costs of this machine, measured at load on the model's own experts: disk, link, CPU, and link beside CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from offmoe.base.costs import Costs
from offmoe.base.keys import ExpertKey
from offmoe.cache.link import LinkSource
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.executor.calibrate import measure
from offmoe.executor.cpu_experts import CpuExperts
from offmoe.kernels.reference import ExpertMath, experts_forward
from offmoe.tiers.copier import Copier

# Experts that are copied and computed in turn: more than a CPU's caches hold, and little to read.
NUM_EXPERTS = 6
# Rows of the product that shows the CPU's arithmetic, and repeats of it.
NUM_ROWS, NUM_REPEATS = 64, 3


def measured_costs(
    experts: ExpertIndex, maths: Sequence[ExpertMath], link: LinkSource, copier: Copier, cpu: CpuExperts, *,
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
    try:
        math = cpu.cpu_math(layer_idx, maths[layer_idx])
        x_1D = torch.randn(1, width_D, dtype=torch.float32).to(math.dtype)
        x_ND = torch.randn(NUM_ROWS, width_D, dtype=torch.float32).to(math.dtype)

        def compute(idx: int, x: torch.Tensor = x_1D) -> None:
            experts_forward(math, [(keys[idx].expert_idx, weights[idx], x)])

        num_weights = weights[0].num_weights
        with torch.inference_mode():
            compute(0, x_ND)
            begin = time.perf_counter()
            for _ in range(NUM_REPEATS):
                compute(0, x_ND)
            rows_s = (time.perf_counter() - begin) / NUM_REPEATS
            return measure(
                copier, [link.parts(key, slot) for slot, key in enumerate(keys)], compute,
                disk_bytes_per_s=sum(host.num_bytes(key) for key in keys) / max(disk_s, 1e-9),
                cpu_flops_per_s=2 * num_weights * NUM_ROWS / max(rows_s, 1e-9), synchronize=link.synchronize,
            )  # fmt: skip
    finally:
        host.release(keys)
