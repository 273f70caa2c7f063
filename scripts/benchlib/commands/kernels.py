"""Time the CPU kernels on rotating experts, format by format, against a streaming read and torch, in turn.

    scripts/bench kernels                                # Qwen3-30B-A3B's experts, all formats: some minutes
    scripts/bench kernels --formats int4 --tokens 1,4    # a part of it
    scripts/bench kernels --out benchmarks/DATE-cpu-kernels.md

A call computes eight experts, up to down, each for all T rows, other experts than the call before: together they are
many times larger than the caches. GB/s are bytes of codes, scales and zero points a second. The read is torch's sum of
memory, in as many threads. Rounds are short, some calls between two reads: a machine that others use too changes its
speed from one second to the next. The table has medians and, for the share of the read, the median of the rounds'
shares of the two reads around them. torch's own op is the same experts in bfloat16 by `kernels.reference`, once each;
with `--torch` it is the format's experts, unpacked for each use, one call after each round of the kernels.
`--cpu-time` counts CPU time of the whole process over the number of threads, for machines that others use too.
A table goes to stderr, one JSON object to stdout, last.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from benchlib.command_line import make_parser
from benchlib.machine import describe_machine, describe_versions
from benchlib.report import without_folders
from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantFormat, QuantKind
from offmoe.core.errors import OffmoeError
from offmoe.kernels.cpu import CpuKernels, load_cpu_kernels
from offmoe.probe.sample_experts import EXPERTS_A_CALL, SampleExperts
from offmoe.probe.speeds import FORMATS as PROBED
from offmoe.tiers.huge_pages import in_huge_pages

ROOT = Path(__file__).parents[3]
READ_BYTES, READ_PIECES = 256 << 20, 4
CALLS_A_ROUND = 3
SPIN_S = 0.3  # for torch's threads, which look for work a while after their last, to go to sleep


def _blocks(kind: QuantKind) -> QuantFormat:
    return QuantFormat(kind=kind, group=BLOCK_KINDS[kind].num_columns, scale_dtype="U8")


FORMATS: dict[str, QuantFormat | None] = {
    **{name: PROBED[name] for name in ("bf16", "int8", "fp8", "int4")},
    "int4-zeros": QuantFormat(kind="int4", group=32, offset=8, symmetric=False),
    "mxfp4": PROBED["mxfp4"],
    "q8_0": _blocks("q8_0"),
    "q6_k": _blocks("q6_k"),
    "q5_k": _blocks("q5_k"),
    "q4_k": _blocks("q4_k"),
    "q4_0": _blocks("q4_0"),
    "mxfp4-gguf": _blocks("mxfp4_gguf"),
    "iq4_xs": _blocks("iq4_xs"),
    "iq4_nl": _blocks("iq4_nl"),
}


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
    times_torch: float | None


class Clock:
    """Seconds of the wall, or of this process's CPUs over the number of its threads."""

    def __init__(self, num_threads: int, *, cpu_time: bool) -> None:
        self._now = time.process_time if cpu_time else time.perf_counter
        self._share = num_threads if cpu_time else 1

    def time(self, work: Callable[[], object]) -> float:
        begin = self._now()
        work()
        return (self._now() - begin) / self._share


class Reader:
    """A streaming read by as many threads as the kernels have: torch's sum, of other memory each time."""

    def __init__(self, num_threads: int) -> None:
        memory = in_huge_pages(torch.ones(READ_BYTES // 8, dtype=torch.int64))
        self._parts = memory.view(READ_PIECES, num_threads, -1)
        self._pool = ThreadPoolExecutor(num_threads)
        self._next = 0

    def bytes_per_s(self) -> float:
        """From the first thread's beginning to the last one's end."""
        piece = self._parts[self._next]
        self._next = (self._next + 1) % READ_PIECES
        times = list(self._pool.map(self._read, piece))
        return piece.nbytes / (max(end for _, end in times) - min(begin for begin, _ in times))

    @staticmethod
    def _read(part: torch.Tensor) -> tuple[float, float]:
        begin = time.perf_counter()
        part.sum()
        return begin, time.perf_counter()


def bench_format(
    name: str, experts: SampleExperts, kernels: CpuKernels, tokens: Sequence[int], args: argparse.Namespace
) -> list[Timed]:
    """Every number of rows, after calls of all experts that are not timed."""
    clock, reader, found = Clock(kernels.num_threads, cpu_time=args.cpu_time), Reader(kernels.num_threads), []
    call_bytes = EXPERTS_A_CALL * experts.expert_bytes
    for num_tokens in tokens:
        steps, plain_steps = experts.calls(kernels, num_tokens), experts.calls(None, num_tokens)
        torch.set_num_threads(kernels.num_threads)
        plains = [clock.time(step) for step in plain_steps] if name == "bf16" and args.dtype == "bfloat16" else []
        torch.set_num_threads(1)
        time.sleep(SPIN_S)
        for step in steps:
            step()
        reads, calls, unpacked = [reader.bytes_per_s()], [], []
        for first in range(0, args.rounds * CALLS_A_ROUND, CALLS_A_ROUND):
            turn = [steps[idx % len(steps)] for idx in range(first, first + CALLS_A_ROUND)]
            calls.append(clock.time(lambda: [step() for step in turn]) / CALLS_A_ROUND)  # noqa: B023  # called here
            reads.append(reader.bytes_per_s())
            if args.torch:
                unpacked.append(_time_torch(clock, plain_steps[first % len(plain_steps)], kernels.num_threads))
        around = [(before + after) / 2 for before, after in itertools.pairwise(reads)]
        found.append(
            Timed(
                format=name,
                tokens=num_tokens,
                call_us=median(calls) * 1e6,
                gb_per_s=call_bytes / median(calls) / 1e9,
                read_gb_per_s=median(reads) / 1e9,
                share_of_read=median(call_bytes / call / read for call, read in zip(calls, around, strict=True)),
                torch_us=median(plains or unpacked) * 1e6 if plains or unpacked else None,
                times_torch=median(t / call for t, call in zip(unpacked, calls, strict=True)) if unpacked else None,
            )
        )
    return found


def _time_torch(clock: Clock, step: Callable[[], object], num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    step_s = clock.time(step)
    torch.set_num_threads(1)
    time.sleep(SPIN_S)
    return step_s


def table(found: Sequence[Timed]) -> list[str]:
    """As Markdown."""
    lines = [
        "| format | rows | us a call | GB/s | read GB/s | share of the read | torch us | times torch |",
        "|" + "---|" * 8,
    ]
    for timed in found:
        plain = "-" if timed.torch_us is None else f"{timed.torch_us:.0f}"
        times = "-" if timed.times_torch is None else f"{timed.times_torch:.1f}"
        lines.append(
            f"| {timed.format} | {timed.tokens} | {timed.call_us:.0f} | {timed.gb_per_s:.1f} | "
            f"{timed.read_gb_per_s:.1f} | {timed.share_of_read:.0%} | {plain} | {times} |"
        )
    return lines


def report(args: argparse.Namespace, kernels: CpuKernels, found: Sequence[Timed], command: Sequence[str]) -> str:
    """The result file."""
    machine, versions = describe_machine(), describe_versions(ROOT)
    assert __doc__ is not None
    return "\n".join([
        f"# CPU kernels, {datetime.datetime.now(datetime.timezone.utc).date()}",
        "",
        f"- command: `{shlex.join(['scripts/bench', 'kernels', *without_folders(command)])}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in machine.items())}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"- kernels: {kernels.level}, {kernels.num_threads} threads; the read and torch likewise",
        f"- experts: width {args.width}, hidden {args.hidden}, {args.dtype} rows; {EXPERTS_A_CALL} experts a call, "
        f"{args.megabytes} MB of them in turn; {args.rounds} rounds; {'CPU' if args.cpu_time else 'wall'} time",
        "",
        *table(found),
        "",
        __doc__.split("\n\n")[2].replace("\n", " "),
        "",
    ])  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Command line entry; returns the exit code."""
    command = list(argv)
    parser = make_parser(__doc__)
    parser.add_argument("--formats", default=",".join(FORMATS), help="with commas (default: %(default)s)")
    parser.add_argument("--tokens", default="1,4,16,64", help="rows an expert (default: %(default)s)")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--megabytes", type=int, default=600, help="of experts in turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="of three calls (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="default: as many as torch has")
    parser.add_argument("--level", default="auto", help="avx512, avx2 or portable")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the rows")
    parser.add_argument("--torch", action="store_true", help="time PyTorch on every format, in turn with the kernels")
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
    found = list[Timed]()
    gc.disable()
    for name in args.formats.split(","):
        dtype = getattr(torch, args.dtype)
        experts = SampleExperts(
            FORMATS[name], width_D=args.width, width_F=args.hidden, working_set=args.megabytes * 10**6, dtype=dtype
        )
        tokens = [int(count) for count in args.tokens.split(",")]
        found += bench_format(name, experts, kernels, tokens, args)
        experts.close()
    print("\n".join(table(found)), file=sys.stderr)
    if args.out is not None:
        args.out.write_text(report(args, kernels, found, command))
    print(json.dumps({"bench": "kernels", "level": kernels.level, "records": [asdict(timed) for timed in found]}))
    return 0
