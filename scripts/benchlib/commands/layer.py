"""Time a token on the CPU: by the fused step, by transformers' modules with our linears, norms and attention, in turn.

    python scripts/make_checkpoint.py --like qwen3-30b-a3b --tiny --layers 24 --out checkpoints/tiny-24
    scripts/bench layer checkpoints/tiny-24 --cold 64MB      # fixed costs: the weights are nearly nothing
    scripts/bench layer checkpoints/qwen3-6l --out benchmarks/DATE-cpu-layer.md

All experts are cached. `token ms` is the median of a token, `layer us` its share for each layer, everything included:
embedding, rotary angles, last norm, logits, sampling. With `--cold`, that much memory is read before each token,
outside of what is timed, so that no cache holds its code and weights; without, tokens follow each other as always.
A table goes to stderr, one JSON object to stdout, last.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import offmoe
from benchlib.command_line import make_parser
from benchlib.machine import describe_machine, describe_versions
from benchlib.report import without_folders
from benchlib.sizes import parse_bytes
from offmoe.core.errors import OffmoeError
from offmoe.engine.parts import parts_of

ROOT = Path(__file__).parents[3]
SYSTEMS = ("fused", "eager")
PROMPT = list(range(3, 35))


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One system: medians over all rounds."""

    system: str
    layer_us: float
    token_ms: float


def use(engine: offmoe.Engine, system: str) -> AbstractContextManager[None]:
    """Context in which tokens take that way."""
    return nullcontext() if system == "fused" else parts_of(engine).only_eager("timed")


def time_tokens(engine: offmoe.Engine, num_tokens: int, cold: torch.Tensor | None) -> list[float]:
    """Milliseconds of every token."""
    marks: list[tuple[float, float]] = []

    def choose(ids: torch.Tensor, logits: torch.Tensor) -> int:
        end_s = time.perf_counter()
        if cold is not None:
            cold.numpy().sum()  # on this thread alone: torch's others would go on spinning for a while
        marks.append((end_s, time.perf_counter()))
        return int(logits.argmax())

    engine.generate(PROMPT, max_new_tokens=num_tokens + 1, choose=choose, ignore_eos=True)
    return [1e3 * (end_s - begin_s) for (_, begin_s), (end_s, _) in zip(marks, marks[1:], strict=False)]


def bench(engine: offmoe.Engine, args: argparse.Namespace) -> list[Timed]:
    """Rounds of all systems in turn."""
    cold = torch.ones(parse_bytes(args.cold) // 4) if args.cold else None
    num_layers = engine.model.config.get_text_config().num_hidden_layers
    found: dict[str, list[float]] = {system: [] for system in args.systems}
    for round_idx in range(args.rounds + 1):
        for system in args.systems:
            with use(engine, system):
                times = time_tokens(engine, args.tokens, cold)
                stats = engine.stats()
            if stats["decode_path"] != system:
                raise OffmoeError(f"tokens are {stats['decode_path']}: {stats['decode_path_reason']}")
            if round_idx:  # the first one warms up
                found[system].extend(times)
    return [
        Timed(system=system, token_ms=median(times), layer_us=1e3 * median(times) / num_layers)
        for system, times in found.items()
    ]


def table(found: Sequence[Timed]) -> list[str]:
    """As Markdown."""
    lines = ["| system | layer us | token ms |", "|" + "---|" * 3]
    return lines + [f"| {t.system} | {t.layer_us:.0f} | {t.token_ms:.2f} |" for t in found]


def report(found: Sequence[Timed], facts: dict[str, Any], command: Sequence[str]) -> str:
    """The result file."""
    machine, versions = describe_machine(), describe_versions(ROOT)
    assert __doc__ is not None
    return "\n".join([
        f"# A token on the CPU, {datetime.datetime.now(datetime.timezone.utc).date()}",
        "",
        f"- command: `{shlex.join(['scripts/bench', 'layer', *without_folders(command)])}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in machine.items())}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"- {', '.join(f'{key}: {value}' for key, value in facts.items())}",
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
    parser.add_argument("model", type=Path, help="a checkpoint folder")
    parser.add_argument("--cold", help="memory to read before each token, such as 64MB (default: none)")
    parser.add_argument("--tokens", type=int, default=32, help="a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="with commas (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="default: as many as torch has")
    parser.add_argument("--out", type=Path, help="also write a result file")
    args = parser.parse_args(command)
    args.systems = args.systems.split(",")
    unknown = sorted(set(args.systems) - set(SYSTEMS))
    if unknown:
        print(f"error: {', '.join(unknown)} not known; systems are {', '.join(SYSTEMS)}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with offmoe.load(args.model, prefetch="off", compile="off", context_length=512) as engine:
            stats = engine.stats()
            facts = {
                "kernels": stats["cpu_kernels"][0], "cold": args.cold or "no",
                "experts cached": f"{stats['experts_cached']} of {stats['experts_total']}",
            }  # fmt: skip
            found = bench(engine, args)
    except OffmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(found)), file=sys.stderr)
    if args.out is not None:
        args.out.write_text(report(found, facts, command))
    print(json.dumps({"bench": "layer", **facts, "records": [asdict(timed) for timed in found]}))
    return 0
