"""What this machine does, measured alone in seconds: memory, experts on the CPU, the link, a drive. For `offmoe probe`.

Each figure is the best of several timings, since a ceiling is asked for. Nothing is written to any drive, and no more
than some hundred megabytes of memory are taken at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from offmoe.base.costs import Costs
from offmoe.base.machine_record import DriveSpeed
from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.checkpoint.shard_file import DIRECT_ALIGN_BYTES, ShardFile
from offmoe.executor.calibrate import measure
from offmoe.formats.dense import ExpertWeights
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.random_weights import fill_at_random
from offmoe.kernels.reference import ExpertMath, experts_forward
from offmoe.tiers.copier import Copier
from offmoe.tiers.disk import NUM_THREADS, PIECE_BYTES
from offmoe.tiers.host import HostPool
from offmoe.tiers.huge_pages import in_huge_pages

REPEATS = 5
READ_BYTES = 256 << 20
# Experts of Qwen3-30B-A3B's shape, more of them than caches hold: 8 a call.
WIDTH_D, WIDTH_F, EXPERTS_A_CALL, WORKING_SET_BYTES = 2048, 768, 8, 150 << 20
FLOPS_ROWS = 64
FORMATS: dict[str, QuantFormat | None] = {
    "bf16": None,
    "int8": QuantFormat(kind="int8", group=32, offset=128),
    "int4": QuantFormat(kind="int4", group=32, offset=8),
    "fp8": QuantFormat(kind="fp8", group=128, group_rows=128, scale_dtype="F32"),
    "mxfp4": QuantFormat(kind="mxfp4", group=32, scale_dtype="U8"),
}  # fmt: skip
# Of a drive: bytes that are read each way at most, and seconds after which it is enough.
DISK_BYTES, DISK_S = 512 << 20, 2.5


def best_s(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The shortest seconds of `repeats` runs, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def host_read(num_bytes: int = READ_BYTES) -> float:
    """Bytes a second of a sum over host memory, with torch's threads."""
    numbers = in_huge_pages(torch.ones(num_bytes // 8, dtype=torch.int64))
    return numbers.nbytes / best_s(numbers.sum)


class SampleExperts:
    """Random experts of one format in slots of a pool, as in the engine."""

    def __init__(
        self, form: QuantFormat | None, *, width_D: int = WIDTH_D, width_F: int = WIDTH_F,
        working_set: int = WORKING_SET_BYTES,
    ) -> None:  # fmt: skip
        self.width_D = width_D
        self.math = ExpertMath(
            activate=_swiglu, up_bias_EF=None, down_bias_ED=None, post_norm=None, transposed=False,
            dtype=torch.bfloat16,
        )  # fmt: skip
        shapes = ((2 * width_F, width_D), (width_D, width_F))
        self.expert_bytes = sum(tensor.nbytes for shape in shapes for tensor in _tensors(_blank(form, shape)))
        num_calls = max(2, -(-working_set // (EXPERTS_A_CALL * self.expert_bytes)))
        slot_bytes = (-(-self.expert_bytes // DIRECT_ALIGN_BYTES) + 1) * DIRECT_ALIGN_BYTES
        self.pool = HostPool(num_slots=num_calls * EXPERTS_A_CALL, slot_bytes=slot_bytes)
        generator = torch.Generator().manual_seed(0)
        first = [_blank(form, shape) for shape in shapes]
        for matrix, shape in zip(first, shapes, strict=True):
            fill_at_random(matrix, shape[1], generator)
        self.weights = []
        for slot in range(self.pool.num_slots):  # all alike: speed does not depend on the values
            up, down = _placed(first, self.pool.tensor(slot))
            self.weights.append(ExpertWeights((up,), (down,)))

    def bytes_per_s(self, kernels: CpuKernels | None, *, num_tokens: int = 1, repeats: int = REPEATS) -> float:
        """Weights read a second, all experts in turn; by the reference where there are no kernels."""
        seconds = best_s(self._run(kernels, num_tokens), repeats)
        return len(self.weights) * self.expert_bytes / seconds

    def flops_per_s(self, kernels: CpuKernels | None) -> float:
        """Operations a second when many rows use an expert."""
        rate = self.bytes_per_s(kernels, num_tokens=FLOPS_ROWS, repeats=1)
        num_weights = 3 * self.width_D * (self.weights[0].up[0].shape[0] // 2)
        return 2 * num_weights * FLOPS_ROWS * rate / self.expert_bytes

    def close(self) -> None:
        """Give the memory back."""
        self.weights.clear()
        self.pool.close()

    def _run(self, kernels: CpuKernels | None, num_tokens: int) -> Callable[[], None]:
        x_TD = torch.randn(num_tokens, self.width_D).to(torch.bfloat16)
        calls = [range(at, at + EXPERTS_A_CALL) for at in range(0, len(self.weights), EXPERTS_A_CALL)]
        if kernels is None:

            def by_torch() -> None:
                for call in calls:
                    experts_forward(self.math, [(idx, self.weights[idx], x_TD) for idx in call])

            return by_torch
        layer = kernels.layer(self.math, self.weights[0])
        y_SD = torch.empty(num_tokens * EXPERTS_A_CALL, self.width_D, dtype=torch.bfloat16)
        weights_TK = torch.rand(1, EXPERTS_A_CALL) if num_tokens == 1 else None
        tokens = range(num_tokens)
        rows = [
            [(idx, self.weights[idx], tokens, range(at * num_tokens, (at + 1) * num_tokens))
             for at, idx in enumerate(call)]
            for call in calls
        ]  # fmt: skip

        def by_kernels() -> None:
            for one in rows:
                kernels.experts(layer, one, x_TD, y_SD, weights_TK)

        return by_kernels


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
        experts = SampleExperts(form, working_set=working_set)
        try:
            found[name] = experts.bytes_per_s(kernels)
            if form is None:
                flops = experts.flops_per_s(kernels)
        finally:
            experts.close()
    return found, flops


def link_costs(
    copier: Copier, device: torch.device, kernels: CpuKernels | None, synchronize: Callable[[], None]
) -> Costs:
    """The link from pinned memory, alone and beside experts on the CPU: as the arbiter measures it at load."""
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
                kernels.experts(layer, [(0, experts.weights[idx], range(1), range(1))], x_1D, y_1D, None)

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
                if state[0] * piece >= most_bytes or time.perf_counter() - begin > most_s:
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


def _swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value


def _blank(form: QuantFormat | None, shape: tuple[int, int]) -> torch.Tensor | QuantMatrix:
    rows, columns = shape
    if form is None:
        return torch.empty(shape, dtype=torch.bfloat16)
    if form.kind == "fp8":
        scales = torch.empty(-(-rows // form.group_rows), -(-columns // form.group), dtype=torch.float32)
        return QuantMatrix(form, shape, torch.empty(shape, dtype=torch.float8_e4m3fn), scales, None)
    if form.kind == "mxfp4":
        scales = torch.empty(rows, columns // form.group, dtype=torch.uint8)
        return QuantMatrix(form, shape, torch.empty(rows, columns // 2, dtype=torch.uint8), scales, None)
    per_word = 8 if form.kind == "int4" else 4
    scales = torch.empty(rows, columns // form.group, dtype=torch.bfloat16)
    return QuantMatrix(form, shape, torch.empty(rows, columns // per_word, dtype=torch.int32), scales, None)


def _tensors(weight: torch.Tensor | QuantMatrix) -> list[torch.Tensor]:
    if isinstance(weight, torch.Tensor):
        return [weight]
    return [tensor for tensor in (weight.codes, weight.scales) if tensor is not None]


def _placed(
    matrices: list[torch.Tensor | QuantMatrix], memory: torch.Tensor
) -> list[torch.Tensor | QuantMatrix]:  # fmt: skip
    """Copies of `matrices` in a slot, each tensor at a multiple of 64 bytes."""
    end, placed = 0, list[torch.Tensor | QuantMatrix]()
    for matrix in matrices:
        copies = []
        for tensor in _tensors(matrix):
            copies.append(memory[end : end + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor))
            end += -(-tensor.nbytes // 64) * 64
        if isinstance(matrix, torch.Tensor):
            placed.append(copies[0])
        else:
            placed.append(QuantMatrix(matrix.format, matrix.shape, copies[0], copies[1], None))
    return placed
