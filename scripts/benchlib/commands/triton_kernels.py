"""Time the Triton expert kernels alone, against a device-to-device copy measured in the same run.

    scripts/bench triton-kernels                    # a GPU: both shapes, bfloat16, then the first quantised; a minute
    scripts/bench triton-kernels --formats int4,fp8 # these alone
    scripts/bench triton-kernels --sweep            # also block sizes of the row kernels, for one token
    scripts/bench triton-kernels --simulate         # no GPU: tiny shapes in the interpreter; tries the script only

Every call takes other experts than the one before, so that no weights are found in L2; calls are captured in a CUDA
graph, so launches cost nothing, and what a launch costs the host is given beside. GB/s are bytes of the weights that a
call must read at least, once for each expert it touches. A table goes to stderr, one JSON object to stdout, last.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchlib.command_line import make_parser
from benchlib.expert_layers import BF16, FORMATS, SHAPES, TINY, Shape, fits, make_layer
from benchlib.ledger import Ledger, TimeIsUpError
from offmoe.formats.dense import view_expert
from offmoe.formats.layout import layout_of
from offmoe.kernels.activations import Activation
from offmoe.kernels.geometry import Tiling, make_tiles, rows_a_tile
from offmoe.kernels.random_weights import fill_at_random
from offmoe.kernels.reference import ExpertMath

if TYPE_CHECKING:
    from offmoe.kernels.triton.launch import LayerKernels

COPY_BYTES = 1 << 30
CALLS_A_GRAPH = 12
WARM_UP_S = 0.1
TOKENS = (1, 4, 16, 64, 512)
# Above this a call is not tried row by row.
MOST_TOKENS_BY_ROW = 16


class Bench:
    """One shape in a slab, and the ways to run and time it."""

    def __init__(self, shape: Shape, device: torch.device, tiling: Tiling, format_name: str) -> None:
        self.shape, self.device, self.format_name = shape, device, format_name
        self.layer = make_layer(shape, FORMATS[format_name])
        self.slot_bytes = layout_of(self.layer).slot_bytes
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30
        self.num_slots = min(shape.num_experts, int(0.6 * free) // self.slot_bytes)
        self.slab = torch.empty(self.num_slots * self.slot_bytes, dtype=torch.uint8, device=device)
        self.tiling = tiling
        self.generator = torch.Generator().manual_seed(1)
        self.fill()

    def fill(self) -> None:
        """Every slot with random weights."""
        generator, offsets = torch.Generator(self.device).manual_seed(2), layout_of(self.layer).offsets
        for slot in self.slab.view(-1, self.slot_bytes):
            weights = view_expert(self.layer, slot, offsets)
            for part in (*weights.up, *weights.down):
                fill_at_random(part, part.shape[1], generator)

    def kernels(self, tiling: Tiling | None = None) -> LayerKernels:
        """The layer's launches with these block sizes."""
        from offmoe.kernels.triton.launch import LayerKernels

        math = ExpertMath(
            activate=torch.nn.functional.silu, up_bias_EF=None, down_bias_ED=None, post_norm=None, transposed=False,
            dtype=torch.bfloat16,
        )  # fmt: skip
        activation = Activation(kind="silu", gated=True)
        layout = layout_of(self.layer)
        return LayerKernels(self.layer, layout, math, activation, self.slab, self.slot_bytes, tiling or self.tiling)

    def choices(self, num_tokens: int) -> torch.Tensor:
        """Slots that random tokens choose, distinct within a token: (T, K)."""
        top_k = min(self.shape.top_k, self.num_slots)
        scores = torch.rand(num_tokens, self.num_slots, generator=self.generator)
        return scores.topk(top_k).indices.to(self.device, torch.int32)

    def rows(self, num_tokens: int, ways: Sequence[str], kernels: LayerKernels) -> list[dict[str, Any]]:
        """Time up, down and the layer for `num_tokens` tokens."""
        shape = self.shape
        x_TD = torch.randn(num_tokens, shape.width_D, device=self.device).to(torch.bfloat16)
        calls = [self.choices(num_tokens) for _ in range(CALLS_A_GRAPH)]
        touched = sum(int(slots.unique().numel()) for slots in calls) / len(calls)
        top_k = calls[0].shape[1]
        weights_TK = torch.rand(num_tokens, top_k, device=self.device)
        hidden = torch.randn(num_tokens * top_k, shape.width_F, device=self.device).to(torch.bfloat16)
        token_N = torch.arange(num_tokens * top_k, dtype=torch.int32, device=self.device) // top_k
        block_rows = rows_a_tile(num_tokens * top_k, shape.num_experts)
        tiles = {id(slots): make_tiles(slots.reshape(-1), block_rows, shape.num_experts) for slots in calls}

        def layer_by_row(slots: torch.Tensor) -> None:
            chosen = kernels.choose(x_TD, top_k, slots, slots)
            kernels.project_and_sum(chosen, slots, slots, weights_TK, torch.bfloat16)

        runs: dict[str, tuple[Callable[[torch.Tensor], object], int]] = {
            "rows up": (lambda slots: kernels.choose(x_TD, top_k, slots, slots), 2),
            "rows down": (lambda slots: kernels.project(hidden, slots, slots), 1),
            "rows down+sum": (
                lambda slots: kernels.project_and_sum(hidden, slots, slots, weights_TK, torch.bfloat16), 1
            ),
            "rows layer": (layer_by_row, 3),
            "tiles layer": (lambda slots: kernels.tiles(x_TD, token_N, slots.reshape(-1), *tiles[id(slots)]), 3),
        }  # fmt: skip
        found = []
        for name, (run, matrices) in runs.items():
            if name not in ways:
                continue
            seconds, host_s = self.time([partial(run, slots) for slots in calls])
            matrix = shape.width_D * shape.width_F
            matrix_bytes = matrix * self.layer.bytes_per_weight
            found.append({
                "shape": shape.name, "format": self.format_name, "tokens": num_tokens, "what": name,
                "us": seconds * 1e6, "host_us": host_s * 1e6,
                "gb_per_s": touched * matrices * matrix_bytes / seconds / 1e9,
                "tflops": num_tokens * top_k * matrices * 2 * matrix / seconds / 1e12,
            })  # fmt: skip
        return found

    def time(self, calls: list[Callable[[], object]], *, rounds: int = 9) -> tuple[float, float]:
        """(device seconds, host seconds) of a call: the median round of a graph of all calls, and the mean of eager."""
        if self.device.type != "cuda":  # in the interpreter, which measures nothing: once
            begin = time.perf_counter()
            calls[0]()
            return time.perf_counter() - begin, 0.0
        for call in calls[:2]:
            call()
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        for call in calls:
            call()
        host_s = (time.perf_counter() - begin) / len(calls)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for call in calls:
                call()
        warm_s = time.perf_counter() + WARM_UP_S  # an idle device runs at a fifth of its clock
        while time.perf_counter() < warm_s:
            graph.replay()
            torch.cuda.synchronize(self.device)
        times = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times) / len(calls), host_s

    def sweep(self) -> list[dict[str, Any]]:
        """One token with other block sizes: up, and down with the sum."""
        found = []
        for elements, inputs, warps, stages in itertools.product((2048, 4096, 8192), (256, 512), (4, 8), (1, 3)):
            tiling = replace(
                self.tiling, row_elements=elements, row_inputs=inputs, row_warps=warps, sum_elements=2 * elements,
                sum_inputs=inputs, sum_warps=warps, stages=stages, row_words=elements // 4, row_words_in=inputs // 8,
                row_words_warps=warps // 2, sum_words=elements // 2, sum_words_in=inputs // 16, sum_words_warps=warps,
            )  # fmt: skip
            settings = {"elements": elements, "inputs": inputs, "warps": warps, "stages": stages}
            timed = self.rows(1, ("rows up", "rows down", "rows down+sum"), self.kernels(tiling))
            found += [record | settings for record in timed]
        return found


def copy_gb_per_s(device: torch.device, num_bytes: int) -> float:
    """A copy within the device's memory, read and write counted: the best of five."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(6):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            target.copy_(source)
            best = min(best, time.perf_counter() - begin)
    return 2 * num_bytes / best / 1e9


def bench_shape(bench: Bench, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """All calls of one shape: row by row where rows are few, by tiles, and both between, where the choice is made."""
    kernels, records = bench.kernels(), []
    for num_tokens in tokens:
        ways = ["rows up", "rows down", "rows down+sum", "rows layer"] if num_tokens <= MOST_TOKENS_BY_ROW else []
        records += bench.rows(num_tokens, [*ways, *(["tiles layer"] if num_tokens > 1 else [])], kernels)
    return records


def print_rows(records: list[dict[str, Any]], copy: float) -> None:
    """To stderr."""
    for record in records:
        settings = " ".join(
            f"{name} {record[name]}" for name in ("elements", "inputs", "warps", "stages") if name in record
        )
        print(
            f"{record['shape']:14} {record['format']:5} {record['tokens']:4} tokens  {record['what']:14} "
            f"{record['us']:9.1f} us {record['gb_per_s']:7.0f} GB/s {record['gb_per_s'] / copy:6.1%} of a copy "
            f"{record['tflops']:6.1f} TFLOP/s (host {record['host_us']:.0f} us) {settings}",
            file=sys.stderr,
        )


def main(argv: Sequence[str]) -> int:
    """Command line entry; returns the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("--sweep", action="store_true", help="also try other block sizes for one token")
    parser.add_argument("--simulate", action="store_true", help="tiny, in Triton's interpreter: measures nothing")
    parser.add_argument("--partial", type=Path, help="JSON file rewritten after every shape and format")
    parser.add_argument("--seconds", type=float, default=600, help="nothing begins after these (default: %(default)g)")
    parser.add_argument("--formats", default=",".join(FORMATS), help="which, by name (default: all)")
    args = parser.parse_args(argv)
    formats = args.formats.split(",")
    if unknown := [name for name in formats if name not in FORMATS]:
        print(f"error: no format {', '.join(unknown)}; known: {', '.join(FORMATS)}", file=sys.stderr)
        return 2
    if args.simulate:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    elif not torch.cuda.is_available():
        print("error: no CUDA device; --simulate tries the script without one", file=sys.stderr)
        return 2
    try:
        from offmoe.kernels.triton.slots import tiling_of
    except ImportError as error:
        print(f"error: triton cannot be imported: {error}", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.simulate else "cuda:0")
    copy = copy_gb_per_s(device, 1 << 20 if args.simulate else COPY_BYTES)
    print(f"device copy {copy:.0f} GB/s (read and write)", file=sys.stderr)
    ledger = Ledger(args.partial, limit_s=args.seconds)
    shapes = TINY if args.simulate else SHAPES
    for shape, format_name in itertools.product(shapes, formats):
        if (format_name != BF16 and shape is not shapes[0]) or not fits(shape, FORMATS[format_name]):
            continue
        with suppress(TimeIsUpError), ledger.step(f"{shape.name} {format_name}"):
            bench = Bench(shape, device, tiling_of(device), format_name)
            if bench.num_slots < shape.top_k:
                why = f"{bench.num_slots} experts fit, {shape.top_k} are needed"
                ledger.add("skipped", where=f"{shape.name} {format_name}", why=why)
                continue
            tokens = TOKENS if format_name == BF16 else TOKENS[:3]
            records = bench_shape(bench, tokens[:2] if args.simulate else tokens) + (
                bench.sweep() if args.sweep else []
            )
            print_rows(records, copy)
            for record in records:
                ledger.add("kernel", **record, copy_share=record["gb_per_s"] / copy)
            del bench
    name = "simulated" if args.simulate else torch.cuda.get_device_name(device)
    result = {"bench": "triton", "simulated": args.simulate, "device": name, "copy_gb_per_s": copy,
              "records": ledger.records}  # fmt: skip
    print(json.dumps(result))
    return 1 if ledger.failures else 0
