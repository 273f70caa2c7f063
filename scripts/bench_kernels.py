"""Time the CPU kernels on rotating experts, format by format, against a streaming read and torch, in turn.

    python scripts/bench_kernels.py                                # Qwen3-30B-A3B's experts, all formats: some minutes
    python scripts/bench_kernels.py --formats int4 --tokens 1,4    # a part of it
    python scripts/bench_kernels.py --out benchmarks/2026-11-22-cpu-kernels.md

A call computes eight experts, up to down, each for all T rows, other experts than the call before: together they are
many times larger than the caches. GB/s are bytes of codes, scales and zero points a second. The read is torch's sum of
a large tensor; torch's own op is the same experts in bfloat16 by `kernels.reference`. Every round times all of them,
one after the other; the table has medians and, for the share of the read, the median of the rounds' own shares.
`--cpu-time` counts CPU time of the whole process over the number of threads, for machines that others use too.
A table goes to stderr, one JSON object to stdout, last.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from benchlib.machine import describe_machine, describe_versions
from benchlib.report import without_folders

from offmoe.base.errors import OffmoeError
from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantFormat, QuantKind
from offmoe.formats.dense import ExpertWeights
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu import CpuKernels, load_cpu_kernels
from offmoe.kernels.cpu.decode import CpuTokenExperts
from offmoe.kernels.cpu.kernels import CpuLayer
from offmoe.kernels.random_weights import fill_at_random
from offmoe.kernels.reference import ExpertMath, experts_forward
from offmoe.tiers.host import HostPool
from offmoe.tiers.huge_pages import in_huge_pages

ROOT = Path(__file__).parents[1]
EXPERTS_A_CALL = 8
READ_BYTES = 256 << 20
Shape = tuple[int, int]
Weight = torch.Tensor | QuantMatrix


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One format and number of rows: medians over the rounds."""

    format: str
    tokens: int
    call_us: float
    gb_per_s: float
    read_gb_per_s: float
    share_of_read: float
    torch_us: float | None


class Clock:
    """Seconds of the wall, or of this process's CPUs over the number of its threads."""

    def __init__(self, num_threads: int, *, cpu_time: bool) -> None:
        self._now = time.process_time if cpu_time else time.perf_counter
        self._share = num_threads if cpu_time else 1

    def time(self, work: Callable[[], object]) -> float:
        begin = self._now()
        work()
        return (self._now() - begin) / self._share


class Experts:
    """Random experts of one format, `working_set` bytes of them, and one layer's arithmetic."""

    def __init__(self, make: Callable[[Shape], Weight], width: int, hidden: int, working_set: int) -> None:
        self.width = width
        self.math = ExpertMath(
            activate=swiglu, up_bias_EF=None, down_bias_ED=None, post_norm=None, transposed=False, dtype=torch.bfloat16
        )
        first = ExpertWeights((make((2 * hidden, width)),), (make((width, hidden)),))
        self.expert_bytes = sum(num_bytes(part) for part in (*first.up, *first.down))
        calls = max(2, -(-working_set // (EXPERTS_A_CALL * self.expert_bytes)))
        # As in the engine: slots of a pool.
        self.pool = HostPool(num_slots=calls * EXPERTS_A_CALL, slot_bytes=(-(-self.expert_bytes // 4096) + 1) * 4096)
        self.weights = [
            self._placed(slot, make((2 * hidden, width)), make((width, hidden))) for slot in range(self.pool.num_slots)
        ]

    def _placed(self, slot: int, up: Weight, down: Weight) -> ExpertWeights:
        begin, memory = 0, self.pool.tensor(slot)

        def place(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal begin
            there = memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            begin += -(-tensor.nbytes // 64) * 64
            return there.copy_(tensor)

        return ExpertWeights(*((map_weight(weight, place),) for weight in (up, down)))

    def calls(self) -> list[range]:
        """The experts of every call."""
        return [range(at, at + EXPERTS_A_CALL) for at in range(0, len(self.weights), EXPERTS_A_CALL)]

    def by_kernels(self, kernels: CpuKernels, num_tokens: int) -> Callable[[], None]:
        """All calls once; one token's rows with their weighted sum, by the call that decoding makes."""
        layer = kernels.layer(self.math, self.weights[0])
        if num_tokens == 1:
            return self._decoding(kernels, layer)
        x_TD = torch.randn(num_tokens, self.width).to(torch.bfloat16)
        y_SD = torch.empty(num_tokens * EXPERTS_A_CALL, self.width, dtype=torch.bfloat16)
        tokens = range(num_tokens)
        calls = [
            [
                (idx, self.weights[idx], tokens, range(at * num_tokens, (at + 1) * num_tokens))
                for at, idx in enumerate(call)
            ]
            for call in self.calls()
        ]

        def run() -> None:
            for rows in calls:
                kernels.experts(layer, rows, x_TD, y_SD, None)

        return run

    def _decoding(self, kernels: CpuKernels, layer: CpuLayer) -> Callable[[], None]:
        x_1D, weights_1K = torch.randn(1, self.width).to(torch.bfloat16), torch.rand(1, EXPERTS_A_CALL)
        token = CpuTokenExperts(kernels, layer, EXPERTS_A_CALL, x_1D, weights_1K)
        calls = [(list(call), [self.weights[idx] for idx in call]) for call in self.calls()]

        def run() -> None:
            for ids, weights in calls:
                token(ids, weights, x_1D, weights_1K)

        return run

    def by_torch(self, num_tokens: int) -> Callable[[], None]:
        """The same by the reference."""
        x_TD = torch.randn(num_tokens, self.width).to(torch.bfloat16)

        def run() -> None:
            for call in self.calls():
                experts_forward(self.math, [(idx, self.weights[idx], x_TD) for idx in call])

        return run


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value


def map_weight(weight: Weight, change: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
    """The same of changed tensors."""
    if isinstance(weight, torch.Tensor):
        return change(weight)
    scales, zeros = (None if part is None else change(part) for part in (weight.scales, weight.zeros))
    return dataclasses.replace(weight, codes=change(weight.codes), scales=scales, zeros=zeros)


def num_bytes(weight: Weight) -> int:
    if isinstance(weight, torch.Tensor):
        return weight.nbytes
    return sum(tensor.nbytes for tensor in (weight.codes, weight.scales, weight.zeros) if tensor is not None)


def random_words(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32)


def random_scales(rows: int, columns: int) -> torch.Tensor:
    return (torch.rand(rows, columns) * 0.01 + 0.001).to(torch.bfloat16)


def integers(kind: str, shape: Shape, *, symmetric: bool = True) -> QuantMatrix:
    """int4 or int8 packed in words, groups of 32."""
    per_word, offset = (8, 8) if kind == "int4" else (4, 128)
    rows, columns = shape
    form = QuantFormat(kind="int4" if kind == "int4" else "int8", group=32, offset=offset, symmetric=symmetric)
    zeros = None if symmetric else random_words(-(-rows // per_word), columns // 32)
    return QuantMatrix(form, shape, random_words(rows, columns // per_word), random_scales(rows, columns // 32), zeros)


def mxfp4(shape: Shape) -> QuantMatrix:
    codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8)
    exponents = torch.randint(115, 120, (shape[0], shape[1] // 32), dtype=torch.uint8)
    return QuantMatrix(QuantFormat(kind="mxfp4", group=32, scale_dtype="U8"), shape, codes, exponents, None)


def fp8(shape: Shape) -> QuantMatrix:
    codes = torch.randint(0, 0x7F, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) * 0.001
    form = QuantFormat(kind="fp8", group=128, group_rows=128, scale_dtype="F32")
    return QuantMatrix(form, shape, codes, scales, None)


def blocks(kind: QuantKind, shape: Shape) -> QuantMatrix:
    """GGUF's."""
    block = BLOCK_KINDS[kind]
    codes = torch.empty(shape[0], shape[1] // block.num_columns * block.num_bytes, dtype=torch.uint8)
    form = QuantFormat(kind=kind, group=block.num_columns, scale_dtype="U8")
    matrix = QuantMatrix(form, shape, codes, None, None)
    fill_at_random(matrix, shape[1], torch.Generator().manual_seed(0))
    return matrix


FORMATS: dict[str, Callable[[Shape], Weight]] = {
    "bf16": lambda shape: (torch.randn(shape) * 0.02).to(torch.bfloat16),
    "int8": lambda shape: integers("int8", shape),
    "fp8": fp8,
    "int4": lambda shape: integers("int4", shape),
    "int4-zeros": lambda shape: integers("int4", shape, symmetric=False),
    "mxfp4": mxfp4,
    "q8_0": partial(blocks, "q8_0"),
    "q6_k": partial(blocks, "q6_k"),
    "q5_k": partial(blocks, "q5_k"),
    "q4_k": partial(blocks, "q4_k"),
    "q4_0": partial(blocks, "q4_0"),
    "mxfp4-gguf": partial(blocks, "mxfp4_gguf"),
}


def bench_format(
    name: str, experts: Experts, kernels: CpuKernels, tokens: Sequence[int], rounds: int, clock: Clock
) -> list[Timed]:
    """Every number of rows: a read, the kernels and torch, `rounds` times in turn after one round that is not kept."""
    to_read, found = in_huge_pages(torch.ones(READ_BYTES // 8, dtype=torch.int64)), []
    num_calls = len(experts.calls())
    for num_tokens in tokens:
        run, plain = experts.by_kernels(kernels, num_tokens), experts.by_torch(num_tokens)
        reads, calls, plains = [], [], []
        for _ in range(rounds + 1):
            reads.append(READ_BYTES / clock.time(to_read.sum) / 1e9)
            calls.append(clock.time(run) / num_calls)
            if name == "bf16":
                plains.append(clock.time(plain) / num_calls)
        speeds = [EXPERTS_A_CALL * experts.expert_bytes / seconds / 1e9 for seconds in calls[1:]]
        found.append(
            Timed(
                format=name,
                tokens=num_tokens,
                call_us=median(calls[1:]) * 1e6,
                gb_per_s=median(speeds),
                read_gb_per_s=median(reads[1:]),
                share_of_read=median(speed / read for speed, read in zip(speeds, reads[1:], strict=True)),
                torch_us=median(plains[1:]) * 1e6 if plains else None,
            )
        )
    return found


def table(found: Sequence[Timed]) -> list[str]:
    """As Markdown."""
    lines = ["| format | rows | us a call | GB/s | read GB/s | share of the read | torch us |", "|" + "---|" * 7]
    for timed in found:
        plain = "-" if timed.torch_us is None else f"{timed.torch_us:.0f}"
        lines.append(
            f"| {timed.format} | {timed.tokens} | {timed.call_us:.0f} | {timed.gb_per_s:.1f} | "
            f"{timed.read_gb_per_s:.1f} | {timed.share_of_read:.0%} | {plain} |"
        )
    return lines


def report(args: argparse.Namespace, kernels: CpuKernels, found: Sequence[Timed], command: Sequence[str]) -> str:
    """The result file."""
    machine, versions = describe_machine(), describe_versions(ROOT)
    assert __doc__ is not None
    return "\n".join([
        f"# CPU kernels, {datetime.datetime.now(datetime.timezone.utc).date()}",
        "",
        f"- command: `{shlex.join(['python', 'scripts/bench_kernels.py', *without_folders(command)])}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in machine.items())}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"- kernels: {kernels.level}, {kernels.num_threads} threads; torch {torch.get_num_threads()} threads",
        f"- experts: width {args.width}, hidden {args.hidden}, bfloat16 rows; {EXPERTS_A_CALL} experts a call, "
        f"{args.megabytes} MB of them in turn; {args.rounds} rounds; {'CPU' if args.cpu_time else 'wall'} time",
        "",
        *table(found),
        "",
        __doc__.split("\n\n")[2].replace("\n", " "),
        "",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    command = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS), help="with commas (default: %(default)s)")
    parser.add_argument("--tokens", default="1,4,16,64", help="rows an expert (default: %(default)s)")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--megabytes", type=int, default=600, help="of experts in turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None, help="default: as many as torch has")
    parser.add_argument("--level", default="auto", help="avx512, avx2 or portable")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time instead of the clock on the wall")
    parser.add_argument("--out", type=Path, help="also write a result file")
    args = parser.parse_args(command)
    unknown = sorted(set(args.formats.split(",")) - set(FORMATS))
    if unknown:
        print(f"error: {', '.join(unknown)} not known; formats are {', '.join(FORMATS)}", file=sys.stderr)
        return 2
    try:
        kernels, note = load_cpu_kernels(args.level, threads=args.threads)
    except OffmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if note:
        print(f"CPU kernels: {note}", file=sys.stderr)
    if kernels is None:
        return 2
    clock, found = Clock(kernels.num_threads, cpu_time=args.cpu_time), list[Timed]()
    for name in args.formats.split(","):
        experts = Experts(FORMATS[name], args.width, args.hidden, args.megabytes * 10**6)
        tokens = [int(count) for count in args.tokens.split(",")]
        found += bench_format(name, experts, kernels, tokens, args.rounds, clock)
    print("\n".join(table(found)), file=sys.stderr)
    if args.out is not None:
        args.out.write_text(report(args, kernels, found, command))
    print(json.dumps({"bench": "kernels", "level": kernels.level, "records": [asdict(timed) for timed in found]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
