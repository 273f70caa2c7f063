"""Measure in one minute what decides how offmoe must be built for a GPU. The first part of `scripts/gpu_check`.

    python scripts/gpu_first.py --partial first.json
    python scripts/gpu_first.py --simulate            # no GPU: tries the script itself, measures nothing

Records: bytes of the driver's context, seconds to page-lock memory, GB/s of the link by size of copy and by the way
through the copier, the host's time for a copied chunk, the host's time, launches and waits of a decoded token, and
whether waiting for the link is seen. Every record is on disk as soon as it is measured; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchlib.device_systems import Place
from benchlib.ledger import Ledger, TimeIsUpError

import offmoe
from offmoe.engine.parts import parts_of
from offmoe.tiers.copier import Copier
from offmoe.tiers.device import Device, SimulatedDevice
from offmoe.tiers.host import HostPool

GIB, MIB = 1 << 30, 1 << 20
EXPERT_BYTES = 9 * MIB  # of Qwen3-30B-A3B in bfloat16
COPY_SIZES = (256 << 10, 2 * MIB, 8 * MIB, EXPERT_BYTES, 16 * MIB, 64 * MIB)
PINNED_BYTES, TINY_BYTES = 2 * GIB, 32 * MIB
DEMO_SLOTS, NUM_TOKENS, NUM_PROFILED = 48, 48, 4
PROMPT = list(range(20, 44))
# Calls of the CUDA runtime by which a host spends its time, as the profiler names them.
RUNTIME_CALLS = ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync", "cudaMemsetAsync",
                 "cudaStreamSynchronize", "cudaEventSynchronize", "cudaEventRecord", "cudaStreamWaitEvent",
                 "cudaGraphLaunch")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partial", type=Path, help="JSON file rewritten after every measurement")
    parser.add_argument("--seconds", type=float, default=55, help="nothing begins after these (default: %(default)g)")
    parser.add_argument("--simulate", action="store_true", help="on a simulated device, at tiny sizes")
    args = parser.parse_args(argv)
    if not args.simulate and not torch.cuda.is_available():
        print("error: no CUDA device; --simulate tries the script without one", file=sys.stderr)
        return 2
    ledger = Ledger(args.partial, limit_s=args.seconds)
    steps: list[tuple[str, Callable[[], None]]] = []
    if not args.simulate:
        steps += [("context", lambda: measure_context(ledger)), ("pinning", lambda: measure_pinning(ledger))]
    steps += [
        ("link", lambda: measure_link(ledger, simulate=args.simulate)),
        ("token", lambda: measure_token(ledger, simulate=args.simulate)),
        ("stall", lambda: measure_stall(ledger, simulate=args.simulate)),
    ]
    for name, step in steps:
        with suppress(TimeIsUpError), ledger.step(name, needs_s=2):
            step()
    print(json.dumps({"bench": "gpu first", "simulated": args.simulate, "records": ledger.records}))
    return 1 if ledger.failures else 0


def used_bytes() -> int | None:
    """Bytes in use on the first GPU, by the driver's word. Asking does not make a context."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return int(done.stdout.split()[0]) * MIB
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def measure_context(ledger: Ledger) -> None:
    """Record the device memory of this process before it allocates: context, first kernels, cuBLAS, Triton."""
    before = used_bytes()
    stages: dict[str, Callable[[], object]] = {
        "context": lambda: torch.cuda.mem_get_info(0),
        "first kernel": lambda: torch.ones(1, device="cuda").add_(1).cpu(),
        "cublas": lambda: torch.ones(256, 256, device="cuda", dtype=torch.bfloat16) @ torch.ones(
            256, 256, device="cuda", dtype=torch.bfloat16
        ),
        "side streams": lambda: [torch.cuda.Stream(priority=-1) for _ in range(2)],
    }  # fmt: skip
    for name, run in stages.items():
        run()
        torch.cuda.synchronize()
        after = used_bytes()
        taken = None if before is None or after is None else (after - before - torch.cuda.memory_reserved(0)) / MIB
        ledger.add(
            "context", stage=name, beside_torch_mib=taken, torch_reserved_mib=torch.cuda.memory_reserved(0) / MIB
        )


def measure_pinning(ledger: Ledger) -> None:
    """Record seconds to page-lock memory: untouched, touched before, and in pieces on several threads."""
    for way, num_pieces, touch in (("untouched", 1, False), ("touched", 1, True), ("4 pieces", 4, True)):
        pool = HostPool(num_slots=1, slot_bytes=PINNED_BYTES)
        pieces = list(pool.slab.chunk(num_pieces))
        begin_s = time.perf_counter()
        if touch:
            with ThreadPoolExecutor(4) as threads:
                list(threads.map(lambda part: part[::4096].zero_(), pool.slab.chunk(4)))
        touched_s = time.perf_counter() - begin_s
        begin_s = time.perf_counter()
        with ThreadPoolExecutor(num_pieces) as threads:
            granted = list(threads.map(_pin, pieces))
        pin_s = time.perf_counter() - begin_s
        for piece, ok in zip(pieces, granted, strict=True):
            if ok:
                torch.cuda.cudart().cudaHostUnregister(piece.data_ptr())
        del pieces
        pool.close()
        ledger.add("pinning", way=way, gib=PINNED_BYTES / GIB, touch_s=touched_s, pin_s=pin_s, granted=all(granted))


def _pin(memory: torch.Tensor) -> bool:
    runtime = torch.cuda.cudart()
    return bool(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0) == runtime.cudaError.success)


def open_device(*, simulate: bool) -> Device:
    """The first CUDA device, or one played in RAM."""
    if simulate:
        return SimulatedDevice(bytes_per_s=4e9)
    from offmoe.tiers.cuda import CudaDevice

    return CudaDevice(0)


def measure_link(ledger: Ledger, *, simulate: bool) -> None:
    """Record GB/s from page-locked memory: torch's own copies by size, then the copier's three ways."""
    device = open_device(simulate=simulate)
    total = TINY_BYTES if simulate else PINNED_BYTES // 2
    sizes = (1 * MIB, 8 * MIB) if simulate else COPY_SIZES
    pool = HostPool(num_slots=1, slot_bytes=total)
    pageable = torch.ones(total // 4, dtype=torch.uint8)
    try:
        pool.slab.fill_(1)
        refused = device.pin(pool.slab)
        ledger.add("pinned", refused=refused)
        target = device.make_pool(1, total).slab
        source = pool.slab[:total]
        if not simulate:
            for size in sizes:
                seconds, host_s = _torch_copies(source, target, size)
                ledger.add("link", way="torch", chunk_mib=size / MIB, gb_per_s=total / seconds / 1e9,
                           host_us_a_copy=1e6 * host_s / (total // size))  # fmt: skip
        for way, memory, urgent in (
            ("urgent", source, True),
            ("not urgent", source, False),
            ("staged", pageable, False),
        ):
            size = EXPERT_BYTES if not simulate else MIB
            num = memory.nbytes // size
            seconds, cpu_s = _copier_copies(device.copier, memory, target, size, num, urgent=urgent)
            ledger.add("link", way=f"copier, {way}", chunk_mib=size / MIB, gb_per_s=num * size / seconds / 1e9,
                       process_us_an_expert=1e6 * cpu_s / num)  # fmt: skip
    finally:
        device.close()
        pool.close()


def _torch_copies(source: torch.Tensor, target: torch.Tensor, size: int) -> tuple[float, float]:
    """(seconds until all are there, seconds until all were queued)."""
    stream: Any = torch.cuda.Stream()
    best = (float("inf"), float("inf"))
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.cuda.stream(stream):
            for at in range(0, source.nbytes - size + 1, size):
                target[at : at + size].copy_(source[at : at + size], non_blocking=True)
        queued_s = time.perf_counter() - begin
        stream.synchronize()
        best = min(best, (time.perf_counter() - begin, queued_s))
    return best


def _copier_copies(
    copier: Copier, source: torch.Tensor, target: torch.Tensor, size: int, num: int, *, urgent: bool
) -> tuple[float, float]:
    """(seconds, the process's CPU seconds) of `num` copies of `size` bytes, all queued at once."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    tickets = [
        copier.copy([(source[at : at + size], target[at : at + size])], urgent=urgent)
        for at in range(0, num * size, size)
    ]
    for ticket in tickets:
        ticket.wait()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def load_demo(*, simulate: bool, **options: Any) -> offmoe.Engine:
    """The bundled model with some of its experts on the device, not compiled."""
    place = Place(simulated_bytes_per_s=4e9 if simulate else None)
    return place.load(None, **{"ram": "4GiB", "compile": "off", "expert_slots": DEMO_SLOTS, **options})


def measure_token(ledger: Ledger, *, simulate: bool) -> None:
    """Record the host's time of a token, and launches, copies and waits of a layer by the profiler."""
    for case, slots in (("some experts on the device", DEMO_SLOTS), ("all experts on the device", 192)):
        with load_demo(simulate=simulate, expert_slots=slots, prefetch="off") as engine:
            generate(engine, NUM_TOKENS)
            stats = generate(engine, NUM_TOKENS)
            layers = len(parts_of(engine).experts.layers)  # the host's work a layer is told by no public door
            counts, num_steps = stats.decode.as_dict(), len(stats.step_s)
            ledger.add(
                "token", case=case, layers=layers, us_a_layer=1e6 * statistics.median(stats.step_s) / layers,
                syncs_a_layer=counts["syncs"] / max(1, counts["layer_calls"]),
                misses_a_token=counts["misses"] / num_steps,
            )  # fmt: skip
            calls, table = profile(partial(generate, engine, NUM_PROFILED))
            of_prompt, _ = profile(partial(generate, engine, 1))
            num_calls = (NUM_PROFILED - 1) * layers
            per_layer = {name: (calls[name] - of_prompt[name]) / num_calls for name in RUNTIME_CALLS if calls[name]}
            ledger.add("host calls a layer", case=case, **per_layer)
            print(table, file=sys.stderr)


def generate(engine: offmoe.Engine, num_new: int) -> Any:
    """Statistics of a greedy reply."""
    return engine.generate(PROMPT, max_new_tokens=num_new, temperature=0, ignore_eos=True).stats


def profile(run: Callable[[], object]) -> tuple[Counter[str], str]:
    """Count operations and runtime calls, beside torch's own table of the 25 that took the host longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch_profile(activities=activities) as found:
        run()
    averages = found.key_averages()
    counts = Counter({event.key: event.count for event in averages})
    return counts, averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)


def measure_stall(ledger: Ledger, *, simulate: bool) -> None:
    """Record whether waiting for the link is seen: what is counted beside what the bytes must have taken."""
    with load_demo(simulate=simulate, expert_slots=8, miss="stream", prefetch="off") as engine:
        generate(engine, 8)
        stats = generate(engine, NUM_TOKENS)
        counts = stats.decode.as_dict()
        ledger.add(
            "stall", link_bytes=counts["link_bytes"], decode_s=sum(stats.step_s),
            counted_stall_s=counts["link_stall_ns"] / 1e9,
            ns_a_byte=counts["link_stall_ns"] / max(1, counts["link_bytes"]),
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
