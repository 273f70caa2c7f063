"""Misses that the kernels read over the link themselves, beside copying them to the device first.

    scripts/bench far-slots               # a GPU: 1, 8 and 64 missing experts; half a minute
    scripts/bench far-slots --simulate    # no GPU: tiny, in Triton's interpreter; tries the script only

An experiment: offmoe copies. A miss that is read where it lies needs no host between router and experts. Both ways give
the same bits, which is checked. Every call takes other experts than the one before. "resident": the same work with
every expert on the device. A table goes to stderr, one JSON object to stdout, last.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchlib.command_line import make_parser
from benchlib.commands.triton_kernels import Bench
from benchlib.expert_layers import BF16, SHAPES, TINY
from benchlib.far_slots import make_far_slab, number_slots
from benchlib.ledger import Ledger, TimeIsUpError

if TYPE_CHECKING:
    from offmoe.kernels.triton.launch import LayerKernels

MISSING = (1, 8, 64)
CALLS = 12


class Misses:
    """A layer whose experts all lie in RAM and on the device, computed from either."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._near = bench, bench.slab.view(-1, bench.slot_bytes)
        far = make_far_slab(bench.slab, bench.num_slots, bench.slot_bytes)
        far.copy_(bench.slab)
        self._far = far.view(-1, bench.slot_bytes)
        self._numbers = number_slots(bench.slab, far, bench.slot_bytes)
        bench.slab = self._numbers.base
        self._kernels: LayerKernels = bench.kernels()

    def measure(self, num_missing: int) -> dict[str, Any]:
        """Microseconds of a call by each way, and whether their results are the same."""
        bench, top_k = self._bench, min(self._bench.shape.top_k, self._bench.num_slots)
        num_tokens = -(-num_missing // top_k)
        x_TD = torch.randn(num_tokens, bench.shape.width_D, device=bench.device).to(torch.bfloat16)
        weights_TK = torch.rand(num_tokens, top_k, device=bench.device)
        order = torch.randperm(bench.num_slots, generator=torch.Generator().manual_seed(3))
        count = num_tokens * top_k
        chosen = [order.roll(-call * count)[:count] for call in range(CALLS)]

        def layer(slots_TK: torch.Tensor) -> torch.Tensor:
            hidden = self._kernels.choose(x_TD, top_k, slots_TK, slots_TK)
            return self._kernels.project_and_sum(hidden, slots_TK, slots_TK, weights_TK, torch.bfloat16)

        def table(experts: torch.Tensor, num_far: int) -> torch.Tensor:
            is_far = torch.arange(count) < num_far
            numbers = experts + torch.where(is_far, self._numbers.first_far, self._numbers.first_near)
            return numbers.view(num_tokens, top_k).to(bench.device, torch.int32)

        def copied(experts: list[int], slots_TK: torch.Tensor) -> torch.Tensor:
            for expert in experts:
                self._near[expert].copy_(self._far[expert], non_blocking=True)
            return layer(slots_TK)

        near, far = [table(one, 0) for one in chosen], [table(one, num_missing) for one in chosen]
        missed = [one[:num_missing].tolist() for one in chosen]
        ways: dict[str, list[Callable[[], torch.Tensor]]] = {
            "resident": [partial(layer, slots) for slots in near],
            "copied": [partial(copied, *pair) for pair in zip(missed, near, strict=True)],
            "read over the link": [partial(layer, slots) for slots in far],
        }
        expected = ways["resident"][0]()
        found: dict[str, Any] = {"ok": all(torch.equal(calls[0](), expected) for calls in ways.values())}
        for name, calls in ways.items():
            seconds, host_s = bench.time(list(calls))
            found |= {f"{name} us": 1e6 * seconds, f"{name} host us": 1e6 * host_s}
        return found


def main(argv: Sequence[str]) -> int:
    """Command line entry; returns the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("--simulate", action="store_true", help="tiny, in Triton's interpreter: measures nothing")
    parser.add_argument("--partial", type=Path, help="JSON file rewritten after every number of experts")
    parser.add_argument("--seconds", type=float, default=60, help="nothing begins after these (default: %(default)g)")
    args = parser.parse_args(argv)
    if args.simulate:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    elif not torch.cuda.is_available():
        print("error: no CUDA device; --simulate tries the script without one", file=sys.stderr)
        return 2
    from offmoe.kernels.triton.slots import tiling_of

    device = torch.device("cpu" if args.simulate else "cuda:0")
    ledger = Ledger(args.partial, limit_s=args.seconds)
    misses = Misses(Bench((TINY if args.simulate else SHAPES)[0], device, tiling_of(device), BF16))
    for num_missing in (1, 4) if args.simulate else MISSING:
        with suppress(TimeIsUpError), ledger.step(f"{num_missing} missing"):
            ledger.add("far slots", missing=num_missing, **misses.measure(num_missing))
    print(json.dumps({"bench": "far slots", "simulated": args.simulate, "records": ledger.records}))
    return 1 if ledger.failures else 0
