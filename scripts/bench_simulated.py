"""Wall-clock benchmark of prefetching and of the miss arbiter on a simulated device: RAM behind a link of a set speed.

    python scripts/bench_simulated.py                                  # a few minutes on two cores
    python scripts/bench_simulated.py --ratios 0.5 --rounds 2 --out /tmp/result.md

The model is made on the spot (random weights, experts of about 600 KB, real text ids). `ratio` is the link's bandwidth
over that at which the same machine computes experts: at 0.2, copying an expert takes five times as long as using it.
All settings are open at once and decode the same text in turns, forwards and backwards; every ratio of speeds is one of
two runs of the same round. Figures tell what the scheduling hides, not how fast a GPU is: two threads share the cores.
Progress goes to stderr; the last line on stdout is one JSON object. Exit code 1: ids differed where they must not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchlib.device_checkpoint import MadeModel, make_model
from benchlib.device_exact import demo_folder
from benchlib.device_systems import OffmoeSystem, Place, Timed
from benchlib.machine import describe_machine, describe_versions
from benchlib.report import number, without_folders
from benchlib.stdlib_text import held_out_ids
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 4096
SIZES = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 32,
    "num_experts_per_tok": 4, "moe_intermediate_size": 192, "intermediate_size": 512, "max_position_embeddings": 4096,
}  # fmt: skip
# Prefetching where every miss takes the link, the arbiter with nothing fetched ahead, and both.
SETTINGS: dict[str, dict[str, Any]] = {
    "stream, prefetch auto": {"miss": "stream", "prefetch": "auto"},
    "stream, prefetch off": {"miss": "stream", "prefetch": "off"},
    "cpu": {"miss": "cpu", "prefetch": "off"},
    "miss auto": {"miss": "auto", "prefetch": "off"},
    "all auto": {"miss": "auto", "prefetch": "auto"},
}
PAIRS = (
    ("stream, prefetch auto", "stream, prefetch off"),
    ("miss auto", "stream, prefetch off"),
    ("miss auto", "cpu"),
    ("all auto", "miss auto"),
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much is run."""

    layers: int
    share: float
    rounds: int
    block: int
    warmup: int
    prompt: int = 16


@dataclass(kw_only=True)
class Result:
    """One link speed: the runs of every setting, in the order of rounds."""

    ratio: float
    link_bytes_per_s: float
    runs: dict[str, list[Timed]] = field(default_factory=dict)

    def speed(self, name: str) -> float:
        """Tokens a second, median over all tokens."""
        return 1 / statistics.median(seconds for run in self.runs[name] for seconds in run.decode_s)

    def compared(self, name: str, other: str) -> float:
        """How many times faster `name` was, median over rounds."""
        return statistics.median(
            sum(b.decode_s) / sum(a.decode_s) for a, b in zip(self.runs[name], self.runs[other], strict=True)
        )

    def per_token(self, name: str, counter: str) -> float:
        """A counter's mean over decoded tokens."""
        runs = self.runs[name]
        return sum(run.decode_counts[counter] for run in runs) / sum(len(run.decode_s) for run in runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    work = Work(layers=args.layers, share=args.share, rounds=args.rounds, block=args.block, warmup=args.warmup)
    ids = [token_id % VOCAB for token_id in held_out_ids(Tokenizer.from_file(str(demo_folder() / "tokenizer.json")))]
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        model = make_model(
            Path(scratch) / "model", "qwen3-30b-a3b", num_layers=work.layers, vocab_size=VOCAB, dtype="float32",
            overrides=SIZES,
        )  # fmt: skip
        compute_s = resident_token_s(model, ids, work)
        routed_bytes = model.expert_bytes * model.num_layers * model.top_k
        progress(f"all experts resident: {compute_s * 1e3:.1f} ms a token, which uses {routed_bytes / 1e6:.1f} MB")
        results = [
            run_ratio(model, ids, work, ratio=float(ratio), link_bytes_per_s=float(ratio) * routed_bytes / compute_s)
            for ratio in args.ratios.split(",")
        ]
    same = all(same_ids(result) for result in results)
    lines = render(args, model, work, compute_s, results, same=same)
    out = args.out or ROOT / "benchmarks" / f"{datetime.date.today().isoformat()}-simulated-link.md"
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), file=sys.stderr)
    print(json.dumps({"bench": "simulated", "compute_s": compute_s, "same_ids": same,
                      "ratios": [as_json(result, compute_s) for result in results]}))  # fmt: skip
    return 0 if same else 1


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratios", default="0.2,0.5,1.0", help="link over compute bandwidth (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.4, help="of the experts in device slots (default: 0.4)")
    parser.add_argument("--layers", type=int, default=8, help="(default: 8)")
    parser.add_argument("--rounds", type=int, default=4, help="forwards and backwards (default: 4)")
    parser.add_argument("--block", type=int, default=32, help="tokens of a run (default: 32)")
    parser.add_argument("--warmup", type=int, default=160, help="tokens before the first run (default: 160)")
    parser.add_argument("--threads", type=int, default=1, help="torch's; the link has one of its own (default: 1)")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/DATE-simulated-link.md)")
    return parser.parse_args(argv)


def open_system(name: str, model: MadeModel, *, slots: int, link_bytes_per_s: float, **options: Any) -> OffmoeSystem:
    """An engine on a simulated device of its own."""
    return OffmoeSystem(
        name, model, Place(simulated_bytes_per_s=link_bytes_per_s), experts=slots, compile="off", context_length=1024,
        ram=4 * model.all_experts_bytes + (2 << 30), **options,
    )  # fmt: skip


def resident_token_s(model: MadeModel, ids: Sequence[int], work: Work) -> float:
    """Seconds of a token when all experts are in slots and nothing moves."""
    system = open_system(
        "resident", model, slots=model.routed_experts, link_bytes_per_s=1e12, miss="stream", prefetch="off"
    )
    try:
        for _ in range(2):
            run = system.run(ids[: 256 + work.block], num_prompt=256)
    finally:
        system.close()
    return run.token_s


def run_ratio(model: MadeModel, ids: Sequence[int], work: Work, *, ratio: float, link_bytes_per_s: float) -> Result:
    """All settings at one link speed."""
    result = Result(ratio=ratio, link_bytes_per_s=link_bytes_per_s, runs={name: [] for name in SETTINGS})
    slots = max(model.top_k, round(work.share * model.routed_experts))
    systems: list[OffmoeSystem] = []
    try:
        for name, options in SETTINGS.items():
            systems.append(open_system(name, model, slots=slots, link_bytes_per_s=link_bytes_per_s, **options))
            progress(f"ratio {ratio}: warming up {name}")
            # A prompt that brings every expert to RAM, then tokens on which arbiter and prefetcher settle.
            systems[-1].run(ids[: 256 + work.warmup], num_prompt=256)
        for round_idx in range(2 * work.rounds):
            size = work.prompt + work.block
            begin = 512 + round_idx // 2 * size
            for system in systems[:: 1 if round_idx % 2 == 0 else -1]:
                result.runs[system.name].append(system.run(ids[begin : begin + size], num_prompt=work.prompt))
            progress(f"ratio {ratio}: round {round_idx + 1} of {2 * work.rounds}")
    finally:
        for system in systems:
            system.close()
    return result


def same_ids(result: Result) -> bool:
    """Prefetching moves bytes earlier and computes the same: ids must be equal, run by run."""
    with_, without = (result.runs[name] for name in PAIRS[0])
    return all(a.next_ids == b.next_ids for a, b in zip(with_, without, strict=True))


def overlap(result: Result, name: str, compute_s: float) -> float:
    """A token's time over the longer of its copies and its computing; 1 is perfect. Misses on the CPU compute too."""
    copy_s = result.per_token(name, "link_bytes") / result.link_bytes_per_s
    return 1 / result.speed(name) / max(copy_s, compute_s)


def as_json(result: Result, compute_s: float) -> dict[str, Any]:
    """One link speed."""
    return {
        "ratio": result.ratio, "link_bytes_per_s": result.link_bytes_per_s,
        "settings": {
            name: {
                "tok_per_s": result.speed(name), "overlap": overlap(result, name, compute_s),
                **{counter: result.per_token(name, counter) for counter in result.runs[name][0].decode_counts},
            }
            for name in SETTINGS
        },
        "speed_ratios": {f"{a} / {b}": result.compared(a, b) for a, b in PAIRS},
    }  # fmt: skip


HEADINGS = (
    "link / compute", "setting", "tok/s", "overlap", "hits", "late", "misses", "on the CPU", "link MB", "ahead MB",
    "of it used", "wasted",
)  # fmt: skip


def render(
    args: argparse.Namespace, model: MadeModel, work: Work, compute_s: float, results: Sequence[Result], *, same: bool
) -> list[str]:
    """The result file."""
    versions = ", ".join(f"{name} {version}" for name, version in describe_versions(ROOT).items())
    command = shlex.join(["python", *without_folders(sys.argv)])
    lines = [
        f"# Prefetch and miss arbiter on a simulated link, {datetime.date.today().isoformat()}", "",
        f"- command: `{command}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in describe_machine().items())}; simulated device",
        f"- versions: {versions}",
        f"- model: {model.num_layers} layers of {model.num_experts} experts of {model.expert_bytes / 1e6:.2f} MB "
        f"(float32, random), top-{model.top_k}; {work.share:.0%} of the experts in device slots, all in RAM; "
        f"{args.threads} torch thread(s)",
        f"- work: {work.rounds} rounds forwards and backwards, {work.block} tokens a run after {work.warmup} of "
        f"warm-up; "
        f"all experts resident: {compute_s * 1e3:.1f} ms a token",
        "", "| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS),
    ]  # fmt: skip
    for result in results:
        for name in SETTINGS:
            counts = {counter: result.per_token(name, counter) for counter in result.runs[name][0].decode_counts}
            cells = [
                f"{result.ratio:g}", name, number(result.speed(name), 1), number(overlap(result, name, compute_s), 2),
                *(number(counts[counter], 1) for counter in ("hits", "late_hits", "misses", "cpu_experts")),
                *(number(counts[counter] / 1e6, 2)
                  for counter in ("link_bytes", "ahead_bytes", "ahead_used_bytes", "ahead_wasted_bytes")),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Counts and megabytes are of one decoded token. overlap: a token's time over the longer of copies "
              "and computing; 1.00 is perfect, and misses computed on the CPU are not in it.", ""]  # fmt: skip
    for result in results:
        for a, b in PAIRS:
            lines.append(f"- link / compute {result.ratio:g}: {a} over {b}: {result.compared(a, b):.2f}x")
    return [*lines, f"- ids with and without prefetching: {'equal' if same else 'DIFFERENT'}"]


def progress(line: str) -> None:
    """One line on stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
