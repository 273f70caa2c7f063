"""Speeds of this machine, each measured alone: memory, experts on the CPU, the link, a drive. For `offmoe probe`.

Memory and links: the best of several timings, since a ceiling is asked for. Experts: the median, as in a run. Nothing
is written to any drive, no more than some hundred megabytes of memory are taken at once, and each figure stops at
sample_experts.MOST_S seconds, whatever it has by then.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional

from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.checkpoint.shard_file import DIRECT_ALIGN_BYTES, ShardFile
from offmoe.kernels.cpu.decode import AttentionShape, CpuAttention
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.reference import experts_forward
from offmoe.machine.costs import Costs
from offmoe.machine.record import OFF_LINES, DriveSpeed
from offmoe.placement.calibrate import measure
from offmoe.probe.sample_experts import (
    EXPERTS_A_CALL,
    WIDTH_D,
    WIDTH_F,
    WORKING_SET_BYTES,
    SampleExperts,
    best_s,
    usual_s,
)
from offmoe.tiers.copier import Copier
from offmoe.tiers.host import HostPool
from offmoe.tiers.huge_pages import in_huge_pages
from offmoe.tiers.pieces import NUM_THREADS, PIECE_BYTES

READ_BYTES = 256 << 20
# Small enough for caches: of the bundled model's size.
CACHED_D, CACHED_F = 256, 128
TURNED = "bf16 turned"  # inputs by outputs, as gpt-oss and others have their experts stacked
TURNED_OFF_LINES = f"{TURNED}{OFF_LINES}"
# Of gpt-oss's shape: how fast these are read depends on how far apart their rows lie (16 GB/s at 3 KB, 10 at 11 KB).
TURNED_WIDTH, TURNED_A_CALL, OFF_LINE_BYTES = 2880, 2, 48
FORMATS: dict[str, QuantFormat | None] = {
    "bf16": None,
    "packed": QuantFormat(kind="packed", group=WIDTH_D, scale_dtype="U8"),
    TURNED: None,
    TURNED_OFF_LINES: None,
    "int8": QuantFormat(kind="int8", group=32, offset=128),
    "int4": QuantFormat(kind="int4", group=32, offset=8),
    "fp8": QuantFormat(kind="fp8", group=128, group_rows=128, scale_dtype="F32"),
    "mxfp4": QuantFormat(kind="mxfp4", group=32, scale_dtype="U8"),
}  # fmt: skip
# Of DeepSeek-V3: heads, their width, latent and rotated width.
LATENT_SHAPE, LATENT_TOKENS = (128, 128, 512, 64), 512
# Of a drive: bytes that are read each way at most, and seconds after which it is enough.
DISK_BYTES, DISK_S = 1 << 30, 2.5


def host_read(num_bytes: int = READ_BYTES) -> float:
    """Bytes a second of a sum over host memory, with torch's threads."""
    numbers = in_huge_pages(torch.ones(num_bytes // 8, dtype=torch.int64))
    return numbers.nbytes / best_s(numbers.sum)


def cpu_speeds(
    kernels: CpuKernels | None, progress: Callable[[str], None] = lambda name: None, *,
    working_set: int = WORKING_SET_BYTES,
) -> tuple[dict[str, float], float]:  # fmt: skip
    """Bytes a second by format, and operations a second of the plain one. Without kernels only the plain one."""
    found, flops = {}, 1.0
    for name, form in FORMATS.items():
        if form is not None and kernels is None:
            continue
        progress(name)
        is_transposed = name in (TURNED, TURNED_OFF_LINES)
        is_wide = is_transposed and working_set >= WORKING_SET_BYTES
        experts = SampleExperts(
            form, turned=is_transposed, working_set=working_set,
            shift=OFF_LINE_BYTES if name == TURNED_OFF_LINES else 0,
            width_D=TURNED_WIDTH if is_wide else WIDTH_D, width_F=TURNED_WIDTH if is_wide else WIDTH_F,
            experts_a_call=TURNED_A_CALL if is_wide else EXPERTS_A_CALL,
        )  # fmt: skip
        try:
            found[name] = experts.bytes_per_s(kernels)
            if name == "bf16":
                flops = experts.flops_per_s(kernels)
        finally:
            experts.close()
    return found, flops


def latent_speeds(kernels: CpuKernels | None) -> tuple[float, float]:
    """One token's attention to latents as attention/latent.py computes it: operations a second of scores and
    results, by the kernels if there are any, and bytes a second of the matrices between the heads and the latents, by
    torch on one thread.
    """
    heads, width, latent, rotated = LATENT_SHAPE
    keys_HNC = torch.randn(heads, width, latent).to(torch.bfloat16)
    x_H1N = torch.randn(heads, 1, width).to(torch.bfloat16)
    query = torch.randn(1, 1, heads, latent + rotated).to(torch.bfloat16)
    states = torch.randn(1, 1, LATENT_TOKENS, latent + rotated).to(torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            if kernels is None:
                attend_s = usual_s(lambda: functional.scaled_dot_product_attention(query, states, states))
            else:
                shape = AttentionShape(
                    num_heads=heads, num_groups=1, width=latent + rotated, value_width=latent, scale=1.0,
                    dtype=torch.bfloat16,
                )  # fmt: skip
                attention = CpuAttention(kernels, shape)
                attend_s = usual_s(lambda: attention.attend(query, states[0], states[0, ..., :latent]))
            read_s = usual_s(lambda: torch.matmul(x_H1N, keys_HNC))
    finally:
        torch.set_num_threads(threads)
    return 2 * LATENT_TOKENS * heads * (2 * latent + rotated) / attend_s, keys_HNC.nbytes / read_s


def cached_speed(kernels: CpuKernels | None) -> float:
    """Bytes a second of plain experts that the processor's caches hold."""
    experts = SampleExperts(None, width_D=CACHED_D, width_F=CACHED_F, working_set=1 << 20)
    try:
        return experts.bytes_per_s(kernels, repeats=50)
    finally:
        experts.close()


def link_costs(
    copier: Copier, device: torch.device, kernels: CpuKernels | None, synchronize: Callable[[], None]
) -> Costs:
    """The link from pinned memory, alone and beside experts on the CPU: as it is measured at load."""
    experts = SampleExperts(None)
    try:
        num = min(EXPERTS_A_CALL, len(experts.weights))
        slots = [torch.empty(experts.expert_bytes, dtype=torch.uint8, device=device) for _ in range(num)]
        copies = [[(experts.pool.tensor(idx)[: experts.expert_bytes], slots[idx])] for idx in range(num)]
        x_1D = torch.randn(1, experts.width_D).to(torch.bfloat16)
        layer = None if kernels is None else kernels.layer(experts.math, experts.weights[0])
        y_1D = torch.empty(1, experts.width_D, dtype=torch.bfloat16)

        def compute(idx: int) -> None:
            if kernels is None or layer is None:
                experts_forward(experts.math, [(0, experts.weights[idx], x_1D)])
            else:
                kernels.experts(layer, [(0, experts.weights[idx], range(1), range(1))], x_1D, y_1D)

        with torch.inference_mode():
            return measure(copier, copies, compute, disk_bytes_per_s=1.0, cpu_flops_per_s=1.0, synchronize=synchronize)
    finally:
        experts.close()


def drive_speed(path: Path, *, most_bytes: int = DISK_BYTES, most_s: float = DISK_S) -> DriveSpeed:
    """Reads of `path`, as the disk tier reads experts: pieces on threads, past the page cache and through it.

    What the page cache holds of the file is asked to be dropped before the buffered reads. A small file is read again
    and again. Raises CheckpointError or DiskReadError.
    """
    file = ShardFile(path)
    try:
        direct = _read_rate(file, most_bytes, most_s, direct=True) if file.open_direct() else None
        _drop_cached(path)
        buffered = _read_rate(file, most_bytes, most_s, direct=False)
        return DriveSpeed(direct_bytes_per_s=direct, buffered_bytes_per_s=buffered, measured_on=path.name)
    finally:
        file.close()


def _read_rate(file: ShardFile, most_bytes: int, most_s: float, *, direct: bool) -> float | None:
    """Bytes a second; None for a file too small to tell."""
    whole = file.num_bytes - file.num_bytes % DIRECT_ALIGN_BYTES
    piece = min(PIECE_BYTES, whole)
    if not piece:
        return None
    starts = range(0, whole - piece + 1, piece)
    if not direct:  # read again, it would come from the page cache
        most_bytes = min(most_bytes, len(starts) * piece)
    pool = HostPool(num_slots=NUM_THREADS, slot_bytes=-(-piece // DIRECT_ALIGN_BYTES) * DIRECT_ALIGN_BYTES)
    lock, state, begin = threading.Lock(), [0, 0], time.perf_counter()

    def work(slot: int) -> None:
        view = pool.memory(slot)[:piece]
        while True:
            with lock:
                # One piece at least: on a busy machine the time may be over before the first is asked for.
                if state[0] * piece >= most_bytes or (state[0] and time.perf_counter() - begin > most_s):
                    return
                number, state[0] = state[0], state[0] + 1
            # From the end on: the begin of a file is likeliest to be cached by the drive itself.
            file.read_into(view, starts[-1 - number % len(starts)], need_bytes=piece, direct=direct)
            with lock:
                state[1] += piece

    try:
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            list(threads.map(work, range(NUM_THREADS)))
        return state[1] / (time.perf_counter() - begin)
    finally:
        pool.close()


def _drop_cached(path: Path) -> None:
    """Ask the system to forget what it holds of the file; pages in use stay."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
